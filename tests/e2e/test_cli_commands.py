"""The command `loraplex` as a user runs it, over the packaged SmolLM2-135M-Instruct."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from loraplex import Client, SamplingParams
from loraplex.entrypoints.cli import main
from loraplex.entrypoints.client.outputs import RequestOutput

pytestmark = pytest.mark.e2e

TESTS = Path(__file__).resolve().parents[1]
ADAPTERS = TESTS.parent / "examples" / "adapters"
COMMAND = [sys.executable, "-P", "-m", "loraplex.entrypoints.cli.main"]
FAKE_COMMAND = [sys.executable, "-P", str(TESTS / "helpers" / "fakes" / "fake_cli.py")]
FAKE = ["--model", "fake", "--skip-tokenizer-init", "--max-num-batched-tokens", "512"]
SMALL = ["--num-pages", "300", "--max-num-seqs", "16", "--max-model-len", "1024"]
QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."


def loraplex(*arguments: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*COMMAND, *arguments], input=stdin, capture_output=True, text=True, timeout=120
    )


def greedy(max_tokens: int = 16) -> list[str]:
    return [*SMALL, "--temperature", "0", "--max-tokens", str(max_tokens)]


def test_generate_prints_one_answer() -> None:
    run = loraplex("generate", *greedy(), QUESTION)
    assert (run.returncode, run.stdout) == (0, ANSWER + "\n"), run.stderr


def test_generate_compares_the_base_with_adapters() -> None:
    run = loraplex(
        "generate", *greedy(), "--adapter-dir", str(ADAPTERS), "--compare", "--use", "pirate,chef",
        "--json", stdin=f"{QUESTION}\nTell me about the sea.\n",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert [line["adapter"] for line in lines] == [None, "pirate", "chef"] * 2
    assert lines[0]["text"] == ANSWER
    assert len({line["text"] for line in lines}) == 6
    assert {line["prompt"] for line in lines} == {QUESTION, "Tell me about the sea."}


def test_generate_in_process_without_a_template() -> None:
    run = loraplex("generate", *greedy(6), "--no-chat", "--in-process", "The capital of France is")
    assert run.returncode == 0, run.stderr
    assert "Paris" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--model", "/nowhere", "hi"], "/nowhere"),
        (["generate", "--adapter", "a=/nowhere", "hi"], "/nowhere"),
        (["generate", "--temperature", "-1", "hi"], "temperature must lie in"),
        (["generate", *SMALL, "--use", "unknown", "hi"], "unknown"),
        (["generate", *SMALL, "--lora-backend", "nope", "hi"], "invalid choice: 'nope'"),
        (["serve", "--endpoint", "tcp://0.0.0.0:5599"], "--insecure"),
        (["serve", "--gpu-memory-utilization", "7"], "gpu_memory_utilization"),
    ],
)
def test_configuration_errors(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main.main(arguments)
    except SystemExit as error:  # argparse
        status = int(error.code or 0)
    assert status == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@contextmanager
def server(
    tmp_path: Path, *arguments: str, command: Sequence[str] = COMMAND, verb: str = "serve"
) -> Iterator["tuple[subprocess.Popen[str], str, str]"]:
    """A server, its endpoint and its output until it was ready. It is killed at the end."""
    endpoint = f"ipc://{tmp_path}/s"
    process = subprocess.Popen(
        [*command, verb, *SMALL, "--endpoint", endpoint, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        said = ""
        while "Ctrl-C stops it" not in said and (line := process.stdout.readline()):
            said += line
        assert f"ready on {endpoint}" in said, said
        yield process, endpoint, said
    finally:
        process.kill()
        process.communicate()


def children_of(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 3
    return children


def assert_gone(children: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(children, timeout=120)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]


def test_serve_answers_and_stops_on_ctrl_c(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with server(tmp_path, "--adapter-dir", str(ADAPTERS)) as (process, endpoint, said):
        assert "lora torch" in said
        children = children_of(process)
        with Client(endpoint) as client:
            messages = [{"role": "user", "content": QUESTION}]
            params = SamplingParams(temperature=0.0, max_tokens=10)
            outputs = list(client.chat(messages, params))
            assert outputs[-1].outputs[0].text == ANSWER
            assert len(outputs) > 3, "the answer was not streamed"
            (last,) = client.chat(messages, params, adapter="pirate", stream=False)
            assert last.outputs[0].text != ANSWER
        assert main.main(["adapters", "list", "--endpoint", endpoint, "--json", "pirate"]) == 0
        pirate = json.loads(capsys.readouterr().out)
        assert (pirate["tier"], pirate["usage"]["num_ended"]) == ("pages", 1)
        assert main.main(["adapters", "unload", "unknown", "--endpoint", endpoint]) == 1
        assert "unknown" in capsys.readouterr().err
        stop(process, signal.SIGINT, children)
        assert not os.path.exists(endpoint.removeprefix("ipc://"))


def test_serve_stops_on_sigterm_with_a_client(tmp_path: Path) -> None:
    with server(tmp_path, *FAKE, command=FAKE_COMMAND) as (process, endpoint, _):
        children = children_of(process)
        with Client(endpoint) as client:
            client.submit([1, 2], SamplingParams(max_tokens=100, ignore_eos=True))
            client.health()  # the request has come
            stop(process, signal.SIGTERM, children)
            (result,) = client.poll(timeout_s=5)
            assert isinstance(result, RequestOutput)
            assert len(result.outputs[0].token_ids) == 100


def stop(process: "subprocess.Popen[str]", number: int, children: list[psutil.Process]) -> None:
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert_gone(children)


def test_serve_fails_with_a_dead_worker(tmp_path: Path) -> None:
    with server(tmp_path, *FAKE, command=FAKE_COMMAND) as (process, _, _):
        children = children_of(process)
        (worker,) = [c for c in children if "fake_worker_proc" in " ".join(c.cmdline())]
        worker.kill()
        _, err = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "worker 0" in err
        assert "SIGKILL" in err
        assert_gone(children)


@pytest.mark.long
def test_cluster_of_real_engines_answers_as_one(tmp_path: Path) -> None:
    options = ("--engines", "2", "--adapter-dir", str(ADAPTERS))
    with server(tmp_path, *options, verb="cluster") as (process, endpoint, said):
        assert ", placement affinity" in said
        children = children_of(process)
        with Client(endpoint) as client:
            messages = [{"role": "user", "content": QUESTION}]
            params = SamplingParams(temperature=0.0, max_tokens=10)
            assert list(client.chat(messages, params))[-1].outputs[0].text == ANSWER
            (last,) = client.chat(messages, params, adapter="pirate", stream=False)
            assert last.outputs[0].text != ANSWER
            assert len(client.stats()["engines"]) == 2
        stop(process, signal.SIGINT, children)
