"""The command line without an engine: prompts in, print-outs out, exit statuses."""

import argparse
import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import loraplex
from loraplex.backends import registry
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import AdapterError, ConfigError, EngineDeadError
from loraplex.engine.ipc.log_setup import LEVEL_VARIABLE
from loraplex.engine.ipc.messages.frontend import EngineInfo
from loraplex.entrypoints.cli import backends as cli_backends
from loraplex.entrypoints.cli import generate as cli_generate
from loraplex.entrypoints.cli import main as cli
from loraplex.entrypoints.cli import serve as cli_serve
from loraplex.entrypoints.cli.output.logging_setup import configure_logging
from loraplex.entrypoints.client.outputs import CompletionOutput, Logprob, RequestOutput
from loraplex.entrypoints.offline.progress import ProgressLine
from loraplex.memory.config import MemoryConfig
from loraplex.scheduler.worker_protocol import WorkerReady

Capture = pytest.CaptureFixture[str]


def output(*texts: str, **options: Any) -> RequestOutput:
    answers = [
        CompletionOutput(i, text, [1, 2], finish_reason="stop", **options)
        for i, text in enumerate(texts)
    ]
    return RequestOutput("0", "p", [3, 4, 5], None, answers, True, None, 1)


@pytest.fixture(autouse=True)
def restored_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    logger = logging.getLogger("loraplex")
    handlers, level = list(logger.handlers), logger.level
    monkeypatch.setenv(LEVEL_VARIABLE, "warning")
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


class TestReadPrompts:
    def test_arguments(self) -> None:
        assert cli_generate.read_prompts(["a", "b\nc"], None) == ["a", "b\nc"]

    def test_file_after_arguments(self, tmp_path: Path) -> None:
        file = tmp_path / "p.txt"
        file.write_text("x\n\n  \ny ü\r\n", encoding="utf-8")
        assert cli_generate.read_prompts(["a"], str(file)) == ["a", "x", "y ü"]

    @pytest.mark.parametrize("file", [None, "-"])
    def test_standard_input(self, file: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("x\ny\n"))
        assert cli_generate.read_prompts([], file) == ["x", "y"]

    def test_nothing_at_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
        with pytest.raises(ConfigError, match="no prompt"):
            cli_generate.read_prompts([], None)

    def test_missing_file(self) -> None:
        with pytest.raises(OSError, match="nowhere"):
            cli_generate.read_prompts([], "/nowhere/p.txt")


class TestAnsweringModels:
    def test_the_base_model_where_there_is_no_adapter(self) -> None:
        assert cli_generate.answering_models(None, False, []) == ["base"]

    def test_adapters_are_never_left_out_silently(self) -> None:
        assert cli_generate.answering_models(None, False, ["a", "b"]) == ["a", "b"]
        assert cli_generate.answering_models(None, True, ["a", "b"]) == ["base", "a", "b"]

    def test_chosen_names(self) -> None:
        assert cli_generate.answering_models("b, base,b", False, ["a", "b"]) == ["b", "base"]
        assert cli_generate.answering_models("b", True, ["a", "b"]) == ["base", "b"]

    @pytest.mark.parametrize(
        ("use", "message"), [("c", "there are base, a"), (",", "names no model")]
    )
    def test_unknown_names(self, use: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            cli_generate.answering_models(use, False, ["a"])


def test_inputs() -> None:
    assert cli_generate.make_input("hi", as_chat=False) == {"prompt": "hi"}
    messages = cli_generate.make_input("hi", as_chat=True, system="be brief")["messages"]
    assert [m["role"] for m in messages] == ["system", "user"]


def test_answers_are_aligned_and_wrapped(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    long = "word " * 20
    cli_generate.print_answers("Why?", ["base", "pirate"], [output(long), output("Arr\n\nmatey")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Why?"
    assert lines[1].startswith("  base    word")
    assert all(len(line) <= 40 for line in lines)
    assert "  pirate  Arr" in lines
    assert "          matey" in lines


def test_an_empty_answer_is_marked(capsys: Capture) -> None:
    cli_generate.print_answers("Why?", ["base"], [output("")])
    assert "(no text)" in capsys.readouterr().out


def test_json_has_a_line_for_each_answer(capsys: Capture) -> None:
    logprobs = [{1: Logprob(-0.5, 1, "x")}, {2: Logprob(-1.5, 1, "y")}]
    cli_generate.print_json(
        "Why?", ["base", "a"], [output("x", "ü"), output("z", logprobs=logprobs)]
    )
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(d["adapter"], d["index"], d["text"]) for d in lines] == [
        (None, 0, "x"), (None, 1, "ü"), ("a", 0, "z"),
    ]  # fmt: skip
    assert lines[2]["logprobs"] == [{"1": -0.5}, {"2": -1.5}]
    assert lines[0]["num_prompt_tokens"] == 3
    assert lines[0]["finish_reason"] == "stop"


def test_serve_says_what_fits_and_what_each_rank_holds() -> None:
    workers = [
        WorkerReady(
            rank=rank, num_pages=101, page_bytes=1 << 20, num_layers=2, max_model_len=512,
            vocab_size=9, device=f"cuda:{rank}", lora_backend="torch", attention_backend="torch",
            load_seconds=1.25, weight_bytes=(5 + rank) << 30, adapter_rank=16,
            adapter_bytes=4 << 20,
        )
        for rank in range(2)
    ]  # fmt: skip
    info = EngineInfo(512, 9, 101, 16, 100, workers)
    config = EngineConfig(memory=MemoryConfig(max_adapter_slots=7))
    text = "\n".join(cli_serve.describe("tcp://127.0.0.1:5", config, info, 1234))
    for part in ("tcp://127.0.0.1:5", "100 pages,", "1,600 tokens", "1,234 registered",
                 "at most 7", "SmolLM2", "context of 512", "lora torch"):  # fmt: skip
        assert part in text
    for rank in range(2):
        assert (
            f"worker {rank}  cuda:{rank}: weights {5 + rank}.00 GiB, pool 202.0 MiB in pages of "
            "2.0 MiB, 4.0 MiB for an adapter of rank 16 on all projections"
        ) in text


def test_backends_table_marks_what_auto_takes() -> None:
    def backend(op: str, name: str, reason: str | None) -> registry.Backend:
        fake: Any = SimpleNamespace(op=op, name=name, probe=lambda: reason)
        return fake

    lines = cli_backends.table(
        [backend("lora", "fast", "no GPU"), backend("lora", "ok", None), backend("lora", "z", None)]
    )
    assert [line.split()[:3] for line in lines[1:]] == [
        ["lora", "fast", "no"], ["lora", "ok", "yes"], ["lora", "z", "yes"],
    ]  # fmt: skip
    assert [("*" in line) for line in lines[1:]] == [False, True, False]
    assert lines[1].endswith("no GPU")


def test_backends_command_runs_here(capsys: Capture) -> None:
    assert cli.main(["backends"]) == 0
    out, _, adapters = capsys.readouterr().out.rpartition("\n\n")
    assert "DoRA" in adapters and "8 weighted adapters a request" in adapters
    assert {line.split()[0] for line in out.splitlines()[1:]} == {
        "lora",
        "attention",
        "fused",
        "linear",
        "collective",
    }


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("no such model"), 2),
        (AdapterError("bad adapter"), 1),
        (EngineDeadError("worker 0 died"), 1),
        (FileNotFoundError("p.txt"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_statuses(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fail(config: EngineConfig) -> int:
        raise error

    monkeypatch.setattr(cli_serve, "run", fail)
    assert cli.main(["serve"]) == status
    text = capsys.readouterr().err
    assert len(text.splitlines()) <= 1
    assert str(error) in text


def test_config_errors_exit_with_2(capsys: Capture) -> None:
    assert cli.main(["serve", "--block-tokens", "3"]) == 2
    assert capsys.readouterr().err.startswith("loraplex: error: block_tokens")


def test_version(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"loraplex {loraplex.__version__}\n"


@pytest.mark.parametrize("argv", [[], ["nope"], ["generate", "--n", "x"]])
def test_usage_errors_exit_with_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2


def test_log_level_reaches_the_engines_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LEVEL_VARIABLE, "nonsense")
    configure_logging(None)
    configure_logging("info")
    assert os.environ[LEVEL_VARIABLE] == "info"


def test_progress_lines_elsewhere_than_on_a_terminal(capsys: Capture) -> None:
    line = ProgressLine()
    for i in range(100):
        line(f"loading {i}")
    line.close()
    assert capsys.readouterr().err.splitlines() == ["loading 0"]


def test_progress_is_silent_without_a_terminal(capsys: Capture) -> None:
    line = ProgressLine(terminal_only=True)
    line("loading")
    assert capsys.readouterr().err == ""


def test_parser_takes_prompts_between_flags() -> None:
    args: argparse.Namespace = cli.make_parser().parse_args(
        ["generate", "--n", "2", "one", "two", "--no-chat"]
    )
    assert (args.prompts, args.chat, args.n) == (["one", "two"], False, 2)
