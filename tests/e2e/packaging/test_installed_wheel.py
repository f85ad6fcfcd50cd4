"""The wheel alone, installed into an environment without the repository, works and is typed."""

import email
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from trove_classifiers import classifiers

from loraplex import Client, SamplingParams

from helpers.models.hf_models import make_hf_model, make_tokenizer

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOP = {n: ROOT / folder for n, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()}

USES_THE_TYPES = """
import asyncio
from collections.abc import Sequence

import loraplex
from loraplex import LLM, AsyncLLM, Client, EngineArgs, LoRARequest, RequestOutput, SamplingParams
from loraplex.lora.request import LoRARequest as SameLoRARequest

params = SamplingParams(temperature=0.0, max_tokens=4)
request: SameLoRARequest = LoRARequest("pirate", 1, "/adapters/pirate")


def offline(llm: LLM) -> list[str]:
    outputs: list[RequestOutput] = llm.generate(["Hi"], params, lora_request=[request])
    ids: Sequence[int] = outputs[0].outputs[0].token_ids
    return [output.outputs[0].text for output in outputs] + [str(len(ids)), loraplex.__version__]


def streamed(client: Client) -> str:
    return "".join(output.outputs[0].text for output in client.generate("Hi", params))


async def online() -> str:
    engine = AsyncLLM.from_engine_args(EngineArgs(model="m"))
    async for output in engine.generate("Hi", params, "id", lora_request=request):
        return output.outputs[0].text
    return ""


asyncio.run(online())
"""
WRONG = {
    "an argument": 'from loraplex import SamplingParams\nSamplingParams(temperature="hot")\n',
    "an option": "from loraplex import LLM\nLLM(max_model_len='long')\n",
    "a result": "from loraplex import RequestOutput\ndef f(o: RequestOutput) -> int:\n"
    "    return o.outputs[0].text\n",
    "a name": "import loraplex\nloraplex.nothing\n",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not importlib.util.find_spec("setuptools") or int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("building without isolation needs setuptools 77 or newer")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for name in {path.relative_to(ROOT).parts[0] for path in TOP.values()}:
        (source / name).symlink_to(ROOT / name)  # no file is copied twice
    build = ["wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    run([sys.executable, "-m", "pip", *build], cwd=source)
    (built,) = folder.glob("loraplex-*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel. It borrows other packages from the tests' own."""
    place = tmp_path_factory.mktemp("installed") / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", str(place)])
    python = place / "bin" / "python"
    install = ["install", "--no-deps", "--no-index", "--no-compile", str(wheel)]
    run([sys.executable, "-m", "pip", "--python", str(python), *install])
    # A path file that a path file names is not read: the editable install stays out.
    (site,) = place.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(command: list[str], cwd: Path | None = None) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_holds_every_module(wheel: Path) -> None:
    expected = set()
    for name, folder in TOP.items():
        for file in folder.rglob("*"):
            is_page = file.parent.name == "console" and file.is_file()
            if file.suffix in (".py", ".cu", ".cuh") or file.name == "py.typed" or is_page:
                place = Path(*name.split("."), *file.relative_to(folder).parts)
                expected.add(place.as_posix())
    expected = {n for n in expected if not n.startswith("loraplex/entrypoints/root/")}
    built = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert built == expected


def test_metadata_is_valid_and_complete(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
    raw = archive.read(name)
    found = Metadata.from_email(raw, validate=True)
    assert (found.name, str(found.version)) == ("loraplex", PROJECT["project"]["version"])
    assert found.author == found.maintainer == "The loraplex authors"
    assert (found.license_expression, found.license_files) == ("Apache-2.0", ["LICENSE"])
    assert name.replace("METADATA", "licenses/LICENSE") in archive.namelist()
    assert set(found.classifiers or ()) <= classifiers
    assert {"http", "gpu", "bench"} <= set(found.provides_extra or ())
    assert str(email.message_from_bytes(raw).get_payload()).startswith("# loraplex")


def test_the_command_and_the_package_are_the_wheels(python: Path, tmp_path: Path) -> None:
    code = "import loraplex, sys; print(loraplex.__file__, 'torch' in sys.modules)"
    file, has_torch = run([str(python), "-c", code], cwd=tmp_path).split()
    assert Path(file).is_relative_to(python.parents[1])
    assert has_torch == "False"
    command = str(python.with_name("loraplex"))
    assert "serve" in run([command, "--help"], cwd=tmp_path)
    assert run([command, "--version"], cwd=tmp_path).strip() == f"loraplex {version('loraplex')}"
    assert "torch" in run([command, "backends"], cwd=tmp_path)


def test_the_installed_server_answers(python: Path, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "model")
    make_hf_model("llama", tmp_path / "model")
    endpoint = f"ipc://{tmp_path}/s"
    serve = [str(python.with_name("loraplex")), "serve", str(tmp_path / "model")]
    serve += ["--device", "cpu", "--num-pages", "100", "--endpoint", endpoint]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    with subprocess.Popen(serve, cwd=tmp_path, env=environment, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            assert any(b"Ctrl-C stops it" in line for line in server.stdout)
            with Client(endpoint) as client:
                (output,) = client.generate("Hi", SamplingParams(max_tokens=5), stream=False)
            assert 1 <= len(output.outputs[0].token_ids) <= 5
        finally:
            server.terminate()
    assert server.returncode == 0


# mypy would read all of torch, which no public name shows, for a minute.
MYPY_SKIPS = "[mypy]\n[mypy-torch.*,numpy.*,triton.*,gguf.*]\nfollow_imports = skip\n"
CHECKERS = {
    "mypy": ["-m", "mypy", "--strict", "--no-incremental", "--python-executable"],
    "pyright": ["-m", "pyright", "--pythonpath"],
}


@pytest.mark.parametrize("checker", CHECKERS)
def test_type_checkers_know_the_installed_package(
    checker: str, python: Path, tmp_path: Path
) -> None:
    (tmp_path / "right.py").write_text(USES_THE_TYPES)
    for number, text in enumerate(WRONG.values()):
        (tmp_path / f"wrong_{number}.py").write_text(text)
    (tmp_path / "mypy.ini").write_text(MYPY_SKIPS)
    command = [sys.executable, *CHECKERS[checker], str(python), "."]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    lines = [line for line in done.stdout.splitlines() if "error" in line and ".py:" in line]
    assert not [line for line in lines if "right.py" in line], done.stdout
    wrong = [n for n in range(len(WRONG)) if any(f"wrong_{n}.py" in line for line in lines)]
    assert wrong == list(range(len(WRONG))), done.stdout + done.stderr
