"""An engine ends in every way that it can: stopped, or with one of its processes killed."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loraplex.engine.config import AdapterConfig, ModelConfig, ServerConfig
from loraplex.engine.errors import ConfigError, EngineDeadError
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.entrypoints.client.outputs import RequestFailure
from loraplex.entrypoints.client.sync_client import Client

from helpers.fakes.fake_engine import fake_config
from helpers.running.processes import (
    GUARD_S,
    assert_gone,
    is_alive,
    make_engine,
    run_dirs,
    running_engine,
    start_engine,
    wait_until,
)

pytestmark = pytest.mark.e2e
SCRIPT = Path(__file__).parents[1] / "helpers" / "fakes" / "serve_fake.py"
LONG = SamplingParams(max_tokens=500)


@contextmanager
def served(mode: str = "serve", *options: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yields a server in a process of its own, and what it printed when it was ready."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), mode, *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=GUARD_S)


class Waiting:
    """A client in a thread that waits for an answer that will not come."""

    def __init__(self, endpoint: str, *, stream: bool) -> None:
        self.error: BaseException | None = None
        self._client = Client(endpoint)
        self._stream = stream
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._begun.wait(GUARD_S), "no request has begun"

    def _run(self) -> None:
        try:
            if self._stream:
                for _ in self._client.generate([1], LONG):
                    self._begun.set()
            else:
                self._client.submit([2], LONG)
                self._client.health()
                self._begun.set()
                (result,) = self._client.poll(GUARD_S)
                assert isinstance(result, RequestFailure)
                raise result.error
        except BaseException as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(GUARD_S)
        assert not self._thread.is_alive(), "the client still waits"
        self._client.close()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("worker 0", r"worker 0 was killed by signal 9 \(SIGKILL\)"),
        ("scheduler", r"scheduler was killed by signal 9 \(SIGKILL\)"),
    ],
)
def test_kill_9_of_a_process_fails_all_who_wait(name: str, text: str) -> None:
    with served("serve", "--delay", "0.02") as (server, known):
        waiting = [Waiting(known["endpoint"], stream=i % 2 == 0) for i in range(6)]
        os.kill(known["names"][name], signal.SIGKILL)
        for client in waiting:
            client.join()
            with pytest.raises(EngineDeadError, match=text):
                raise client.error or AssertionError("it got an answer")
        assert server.wait(GUARD_S) == 1
        assert_gone(known)
        assert f"{name} was killed by signal 9" in server.stderr.read()


def test_kill_9_of_the_supervisor_takes_everything_along() -> None:
    with served("serve", "--delay", "0.02") as (server, known):
        waiting = [Waiting(known["endpoint"], stream=i % 2 == 0) for i in range(2)]
        server.kill()
        for client in waiting:
            client.join()
            assert isinstance(client.error, EngineDeadError)
        assert_gone(known)


def start_hanging_server(before: set[str]) -> "subprocess.Popen[bytes]":
    """Returns a server that waits for its worker; its frontend listens already."""
    server = subprocess.Popen([sys.executable, str(SCRIPT), "serve", "--hang"])
    wait_until(lambda: run_dirs() - before)
    (run_dir,) = run_dirs() - before
    wait_until(lambda: os.path.exists(f"{run_dir}/clients"))
    return server


def test_kill_9_of_the_supervisor_while_it_starts() -> None:
    before = run_dirs()
    server = start_hanging_server(before)
    server.kill()
    server.wait()
    wait_until(lambda: run_dirs() <= before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("whole_group", [True, False])
def test_signals_stop_cleanly(number: int, whole_group: bool) -> None:
    with served("serve", "--delay", "0.02") as (server, known):
        waiting = Waiting(known["endpoint"], stream=True)
        # Ctrl-C in a terminal reaches the whole process group.
        (os.killpg if whole_group else os.kill)(server.pid, number)
        waiting.join()
        with pytest.raises(EngineDeadError, match="the engine was stopped"):
            raise waiting.error or AssertionError("it got an answer")
        assert server.wait(GUARD_S) == 0
        assert_gone(known)
        assert server.stderr.read().strip() == ""


def test_a_signal_while_starting_stops_cleanly() -> None:
    before = run_dirs()
    server = start_hanging_server(before)
    server.send_signal(signal.SIGTERM)
    assert server.wait(GUARD_S) == 0
    assert run_dirs() <= before


def test_a_script_that_forgets_to_stop_leaves_nothing() -> None:
    """The script starts the engine in a thread that ends, has no main guard and never stops it."""
    with served("thread") as (server, known):
        assert server.wait(GUARD_S) == 0
        assert_gone(known)


def test_an_engine_that_is_dropped_ends() -> None:
    engine = make_engine(fake_config())
    left = start_engine(engine)
    del engine
    assert_gone(left)


def test_stop_may_be_called_often_and_by_many() -> None:
    engine = make_engine(fake_config())
    left = start_engine(engine)
    threads = [threading.Thread(target=engine.stop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GUARD_S)
    engine.stop()
    assert engine.wait(GUARD_S) == 0
    assert engine.dead_reason is None
    assert_gone(left)


def test_a_worker_that_fails_says_why_to_everyone() -> None:
    with running_engine(fake_config(), "--crash-after", "3") as engine:
        with (
            Client(engine.endpoint) as client,
            pytest.raises(EngineDeadError, match="worker 0 failed: RuntimeError: the fake device"),
        ):
            list(client.generate([1], LONG))
        assert engine.wait(GUARD_S) == 1
        assert "the fake device is broken" in str(engine.dead_reason)


def test_a_hung_process_is_killed() -> None:
    engine = make_engine(fake_config())
    left = start_engine(engine)
    os.kill(engine.pids["scheduler"], signal.SIGSTOP)
    engine.stop(timeout_s=1.0)
    assert_gone(left)


def test_start_errors_come_with_the_childs_own_words() -> None:
    before = run_dirs()
    with pytest.raises(ConfigError, match="^the model cannot be read$"):
        make_engine(fake_config(), "--fail", "the model cannot be read").start(GUARD_S)
    missing = fake_config(model=ModelConfig(model="/nowhere/model"))
    with pytest.raises(ConfigError, match="/nowhere/model does not exist"):
        make_engine(missing).start(GUARD_S)
    adapters = fake_config(adapter=AdapterConfig(adapters=(("x", "/nowhere"),)))
    with pytest.raises(ConfigError, match="adapter 'x'"):
        make_engine(adapters).start(GUARD_S)
    public = fake_config(server=ServerConfig(endpoint="tcp://0.0.0.0:0"))
    with pytest.raises(ConfigError, match="--insecure"):
        make_engine(public).start(GUARD_S)
    assert run_dirs() <= before


def test_a_process_that_never_gets_ready_is_named() -> None:
    engine = make_engine(fake_config(), "--hang")
    with pytest.raises(EngineDeadError, match="worker 0, scheduler, frontend 0 .* in time"):
        engine.start(timeout_s=2)
    assert not any(map(is_alive, engine.pids.values()))


def test_a_port_in_use_is_reported() -> None:
    server = ServerConfig(endpoint="tcp://127.0.0.1:0")
    with running_engine(fake_config(server=server)) as engine:
        again = fake_config(server=ServerConfig(endpoint=engine.endpoint))
        with pytest.raises(ConfigError, match="cannot listen on"):
            make_engine(again).start(GUARD_S)
        with Client(engine.endpoint) as client:
            assert client.health()["status"] == "ok"


def test_a_named_socket_file_is_removed_even_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "served"
    config = fake_config(server=ServerConfig(endpoint=f"ipc://{path}"))
    with running_engine(config) as engine:
        assert path.exists()
        os.kill(engine.pids["frontend 0"], signal.SIGKILL)
        os.kill(engine.pids["scheduler"], signal.SIGKILL)
        assert engine.wait(GUARD_S) == 1
        assert not path.exists()


def test_a_client_finds_the_next_engine_at_the_same_address(tmp_path: Path) -> None:
    config = fake_config(server=ServerConfig(endpoint=f"ipc://{tmp_path}/served"))
    with running_engine(config) as engine:
        client = Client(engine.endpoint, timeout_s=1)
        client.submit([1], LONG)
    (result,) = client.poll(GUARD_S)
    assert isinstance(result, RequestFailure)
    with pytest.raises(EngineDeadError, match="no server was reached"):
        client.health()

    def is_healthy() -> bool:
        try:
            return client.health()["status"] == "ok"
        except EngineDeadError:  # not connected again within its timeout
            return False

    for _ in range(2):  # the second time the client sleeps through the end of the engine
        with running_engine(config):
            wait_until(is_healthy)
    client.close()


def test_nobody_there_is_an_error_in_time() -> None:
    with pytest.raises(EngineDeadError, match="no server was reached at tcp://127.0.0.1:1 in"):
        Client("tcp://127.0.0.1:1", timeout_s=0.3)
