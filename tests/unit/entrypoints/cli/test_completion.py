"""Real shells complete commands, flags and values by the scripts of `loraplex completion`."""

import shutil
import subprocess
from pathlib import Path

import pytest

from loraplex.entrypoints.cli import main as cli

Capture = pytest.CaptureFixture[str]

IN_BASH = """
source "$1"; shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
$(complete -p loraplex | sed -n 's/.*-F \\([^ ]*\\) .*/\\1/p')
printf '%s\\n' "${COMPREPLY[@]}"
"""
IN_FISH = 'source $argv[1]; complete -C "$argv[2..]" | string split -f1 \\t'
CHECK = {"bash": ["bash", "-n"], "zsh": ["zsh", "-n"], "fish": ["fish", "-n"]}
CASES = {
    "": {
        "serve",
        "cluster",
        "generate",
        "adapters",
        "bench",
        "backends",
        "completion",
        "keys",
        "top",
    },
    "adapters ": {"list", "load", "unload", "pin", "unpin"},
    "serve --lora-": {"--lora-backend"},
    "serve --lora-backend t": {"triton", "torch"},
    "bench throughput --num-r": {"--num-requests"},
    "completion ": {"bash", "zsh", "fish"},
}


@pytest.fixture
def script_of(capsys: Capture, tmp_path: Path):
    def write(shell: str) -> Path:
        if not shutil.which(shell):
            pytest.skip(f"{shell} is not installed")
        assert cli.main(["completion", shell]) == 0
        file = tmp_path / f"loraplex.{shell}"
        file.write_text(capsys.readouterr().out)
        return file

    return write


def run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.parametrize("shell", CHECK)
def test_the_shell_can_read_its_script(shell: str, script_of) -> None:
    run([*CHECK[shell], str(script_of(shell))])


@pytest.mark.parametrize("line", CASES)
def test_bash_completes(line: str, script_of) -> None:
    words = ["loraplex", *line.split(" ")]
    out = run(["bash", "--norc", "-c", IN_BASH, "-", str(script_of("bash")), *words])
    assert set(out.split()) == CASES[line]


@pytest.mark.parametrize("line", CASES)
def test_fish_completes(line: str, script_of) -> None:
    out = run(["fish", "-N", "-c", IN_FISH, "--", str(script_of("fish")), f"loraplex {line}"])
    assert set(out.split()) == CASES[line]


def test_bash_completes_folders(script_of, tmp_path: Path) -> None:
    (tmp_path / "folder-of-adapters").mkdir()
    (tmp_path / "folder-file").write_text("")
    words = ["loraplex", "serve", "--adapter-dir", f"{tmp_path}/folder-"]
    out = run(["bash", "--norc", "-c", IN_BASH, "-", str(script_of("bash")), *words])
    assert out.split() == [f"{tmp_path}/folder-of-adapters"]


def test_an_unknown_shell_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["completion", "tcsh"])
    assert caught.value.code == 2
