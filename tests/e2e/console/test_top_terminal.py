"""`loraplex top` in a real terminal, against an engine with a worker that has no model."""

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex import Client, SamplingParams
from loraplex.engine.config import AdapterConfig, ServerConfig
from loraplex.engine.processes.engine import Engine

from helpers.fakes.fake_engine import fake_config, make_fake_adapter
from helpers.running.processes import GUARD_S, running_engine

pytestmark = pytest.mark.e2e
TOP = [sys.executable, "-P", "-m", "loraplex.entrypoints.cli.main", "top"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    path = make_fake_adapter(tmp_path_factory.mktemp("adapters") / "pirate", "arr")
    config = fake_config(
        adapter=AdapterConfig(adapters=(("pirate", str(path)),)),
        server=ServerConfig(endpoint="tcp://127.0.0.1:0", http="127.0.0.1:0"),
    )
    with running_engine(config) as engine:
        with Client(engine.endpoint) as client:
            list(client.generate([5, 6], SamplingParams(max_tokens=3), adapter="pirate"))
        yield engine


def address(engine: Engine, kind: str) -> str:
    return engine.endpoint if kind == "zmq" else f"http://{engine.http_endpoint}"


def read_until(master: int, *wanted: str) -> str:
    """Returns what a terminal was sent once it has all texts that are wanted."""
    seen, deadline = "", time.monotonic() + GUARD_S
    while not all(text in seen for text in wanted):
        assert time.monotonic() < deadline, seen[-2000:]
        seen += os.read(master, 65536).decode(errors="replace")
    return seen


@pytest.mark.parametrize("kind", ["zmq", "http"])
def test_top_in_a_terminal(engine: Engine, kind: str) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = subprocess.Popen(
        [*TOP, "--endpoint", address(engine, kind)],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"},
        start_new_session=True,
    )
    os.close(slave)
    try:
        read_until(master, "new tokens/s", "pirate", "▀", "1 of 1 adapters in pages")
        os.write(master, b"q")
        while process.poll() is None:
            try:
                os.read(master, 65536)
            except OSError:  # the terminal's other end is closed
                break
        assert process.wait(GUARD_S) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)


@pytest.mark.parametrize("kind", ["zmq", "http"])
def test_json_views_reach_a_pipe(engine: Engine, kind: str) -> None:
    command = [*TOP, "--json", "--endpoint", address(engine, kind)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        views = [json.loads(process.stdout.readline()) for _ in range(2)]
        process.terminate()
    assert views[0]["time"] < views[1]["time"]
    (row,) = views[1]["adapters"]
    assert (row["name"], row["tier"], row["num_loads"]) == ("pirate", "pages", 1)
    (pool,) = views[1]["pools"]
    (slot,) = pool["slots"]
    code = 3 + int(slot)
    runs = list(zip(pool["runs"][::2], pool["runs"][1::2], strict=True))
    assert sum(count for kind, count in runs if kind == code) == row["num_pages"]
    assert sum(count for _, count in runs) == views[1]["pages"]["num_pages"]


def test_top_ends_when_the_server_does(tmp_path: Path) -> None:
    config = fake_config(server=ServerConfig(endpoint="tcp://127.0.0.1:0", http="127.0.0.1:0"))
    with running_engine(config) as engine:
        command = [*TOP, "--json", "--endpoint", address(engine, "http")]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline()
    _, error = process.communicate(timeout=GUARD_S)
    assert process.returncode == 1 and error.startswith("loraplex: error:"), error
