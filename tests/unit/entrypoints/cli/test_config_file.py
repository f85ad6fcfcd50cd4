"""A configuration file means what the same flags on the command line mean."""

import argparse
from pathlib import Path

import pytest

from loraplex.engine.config import EngineConfig
from loraplex.entrypoints.cli import flags
from loraplex.entrypoints.cli import main as cli

Capture = pytest.CaptureFixture[str]
FILE = """
# of a server
model: /models/m
max_model_len: 77
dtype: bfloat16
pool-bytes: 1.5G
enable-prefix-caching: no
insecure: TRUE
adapter:
  a: /x
  b: /y=z
adapter-mix: ["both=a:0.5,b:2"]
max-wait-s: 1e1
seed: 010
log-level: debug
enable-lora: false
"""
ARGUMENTS = (
    "--model", "/models/m", "--max-model-len", "77", "--dtype", "bfloat16", "--pool-bytes", "1.5G",
    "--no-enable-prefix-caching", "--insecure", "--adapter", "a=/x", "--adapter", "b=/y=z",
    "--adapter-mix", "both=a:0.5,b:2", "--max-wait-s", "10", "--seed", "10",
)  # fmt: skip


def parse(*argv: str) -> argparse.Namespace:
    return cli.make_parser().parse_args(argv)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "server.yaml"
    path.write_text(FILE, encoding="utf-8")
    return path


@pytest.mark.parametrize("command", ["serve", "cluster"])
def test_a_file_equals_its_flags(command: str, file: Path) -> None:
    args = parse(command, "--config", str(file))
    assert flags.engine_config_of(args) == flags.engine_config_of(parse(command, *ARGUMENTS))
    assert args.log_level == "debug"


def test_flags_that_are_no_option_of_the_engine(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("engines: 3\nplacement: random\nray-address: none\n", encoding="utf-8")
    args = parse("cluster", f"--config={path}", "--placement", "affinity")
    assert (args.engines, args.placement, args.ray_address) == (3, "affinity", "none")
    assert args.min_engines is None and callable(args.command)


def test_the_command_line_goes_before_the_file(file: Path) -> None:
    args = parse(
        "serve", "other", "--max-model-len", "5", "--config", str(file), "--no-insecure",
        "--adapter", "c=/c", "--adapter", "d=/d", "--enable-prefix-caching",
    )  # fmt: skip
    config = flags.engine_config_of(args)
    assert (config.model.model, config.model.max_model_len) == ("other", 5)
    assert not config.server.insecure and config.memory.enable_prefix_caching
    assert config.adapter.adapters == (("c", "/c"), ("d", "/d"))
    assert config.adapter.adapter_mixes == (("both", "a:0.5,b:2"),)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n", encoding="utf-8")
    assert flags.engine_config_of(parse("serve", "--config", str(path))) == EngineConfig()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("max-num-seq: 5", ":1: unknown name 'max-num-seq': did you mean --max-num-seqs?"),
        ("model: m\nlora_modules: x", ":2: unknown name 'lora_modules': use --adapter NAME=PATH"),
        ("max_num_seqs: many", "argument --max-num-seqs: invalid int value: 'many'"),
        ("pool-bytes: big", "'big' is no size"),
        ("dtype: int3", "argument --dtype: invalid choice: 'int3'"),
        ("insecure: 3", ":1: insecure must be true or false, got '3'"),
        ("no-insecure: true", "unknown name 'no-insecure'"),
        ("config: x.yaml", "unknown name 'config'"),
        ("seed: 1\nseed: 2", ":2: 'seed' is there twice"),
        ("max-num-seqs: 1\nmax_num_seqs: 2", ":2: 'max_num_seqs' is there twice"),
        ("model: [a, b]", ":1: model takes one value"),
        ("adapter:\n  a: [b]", ":2: lists and maps may hold texts and numbers only"),
        ("adapter: [nothing]", "'nothing' should read NAME=VALUE"),
        ("- model", "must be a map from names of flags to values"),
        ("model: 'm", "is not YAML: "),
    ],
)
def test_errors_name_the_file(tmp_path: Path, capsys: Capture, text: str, error: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as raised:
        parse("serve", "--config", str(path))
    assert raised.value.code == 2
    said = capsys.readouterr().err
    assert error in said and str(path) in said


def test_a_missing_file(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        parse("serve", "--config", "/nowhere.yaml")
    assert "cannot read the configuration file /nowhere.yaml: " in capsys.readouterr().err
