"""A process that hangs under load: its clients get an error that names it, and nothing is left."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from loraplex.engine.config import (
    AdapterConfig,
    EngineConfig,
    ParallelConfig,
    ProcessConfig,
    ServerConfig,
)
from loraplex.engine.errors import AdapterError, ConnectionLostError, EngineDeadError
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.engine.processes.engine import Engine
from loraplex.entrypoints.client.sync_client import Client

from helpers.fakes.fake_engine import expected_tokens, fake_config, make_fake_adapter
from helpers.running.processes import GUARD_S, assert_gone, leftovers, running_engine, wait_until

pytestmark = pytest.mark.e2e
LONG = SamplingParams(max_tokens=500)
SHORT = SamplingParams(max_tokens=5)
TWO_RANKS = fake_config(parallel=ParallelConfig(tensor_parallel_size=2))


class Waiting:
    """A client in a thread that streams until its request fails."""

    def __init__(self, engine: Engine, prompt: list[int]) -> None:
        self.error: BaseException | None = None
        self._client, self._prompt = Client(engine.endpoint), prompt
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def begin(self) -> "Waiting":
        """Send the request, and wait for its first token or its error."""
        self._thread.start()
        assert self._begun.wait(GUARD_S)
        return self

    def _run(self) -> None:
        try:
            for _ in self._client.generate(self._prompt, LONG):
                self._begun.set()
        except BaseException as error:
            self.error = error
        self._begun.set()
        self._client.close()

    def join(self) -> BaseException:
        self._thread.join(GUARD_S)
        assert not self._thread.is_alive(), "the client still waits"
        assert self.error is not None, "it got an answer"
        return self.error


@contextmanager
def loaded_engine(config: EngineConfig, *options: str) -> Iterator[tuple[Engine, list[Waiting]]]:
    """Yields an engine with four running requests."""
    with running_engine(config, "--delay", "0.05", *options) as engine:
        waiting = [Waiting(engine, [i + 1]) for i in range(4)]  # all are connected then
        yield engine, [client.begin() for client in waiting]


@pytest.mark.parametrize(
    ("name", "num_ranks", "text"),
    [
        ("worker 0", 1, "^worker 0 was stopped by a signal for 3 s, and was killed$"),
        ("worker 1", 2, r"^worker 1 was stopped .*, and was killed \(worker rank 1 of 2\)$"),
        ("scheduler", 1, "^scheduler was stopped by a signal for 3 s, and was killed$"),
    ],
)
def test_a_stopped_process_ends_the_engine(name: str, num_ranks: int, text: str) -> None:
    config = TWO_RANKS if num_ranks == 2 else fake_config()
    with loaded_engine(config) as (engine, waiting):
        left = leftovers(engine)
        os.kill(engine.pids[name], signal.SIGSTOP)
        for client in waiting:
            with pytest.raises(EngineDeadError, match=text):
                raise client.join()
        assert engine.wait(GUARD_S) == 1
        assert_gone(left)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named_to_every_client(rank: int) -> None:
    text = rf"^worker {rank} was killed by signal 9 .*\(worker rank {rank} of 2\)$"
    with loaded_engine(TWO_RANKS) as (engine, waiting):
        left = leftovers(engine)
        os.kill(engine.pids[f"worker {rank}"], signal.SIGKILL)
        for client in waiting:
            with pytest.raises(EngineDeadError, match=text):
                raise client.join()
        assert engine.wait(GUARD_S) == 1
        assert_gone(left)


def test_a_stopped_frontend_is_replaced() -> None:
    with loaded_engine(fake_config()) as (engine, waiting):
        endpoint, former = engine.endpoint, engine.pids["frontend 0"]
        os.kill(former, signal.SIGSTOP)
        for client in waiting:
            assert isinstance(client.join(), ConnectionLostError)
        wait_until(lambda: engine.pids["frontend 0"] != former)
        with Client(endpoint, timeout_s=GUARD_S) as again:
            (*_, output) = again.generate([3], SHORT)
            assert output.outputs[0].token_ids == expected_tokens([3], max_tokens=5)
        assert engine.dead_reason is None
        assert not psutil.pid_exists(former), "the stopped process was not reaped"


def test_a_worker_that_is_busy_without_progress_ends_the_engine() -> None:
    """It holds no lock and is not stopped: its step does not end."""
    config = fake_config(process=ProcessConfig(watchdog_timeout=3.0))
    with loaded_engine(config, "--sleep-after", "8") as (engine, waiting):
        for client in waiting:
            with pytest.raises(EngineDeadError, match="worker 0 made no progress for 3 s"):
                raise client.join()
        assert engine.wait(GUARD_S) == 1


@pytest.mark.long
def test_a_rank_that_never_answers_a_load_is_named_and_then_killed(tmp_path: Path) -> None:
    """Its beats and steps go on. Two minutes after the load its request fails, then the engine."""
    path = str(make_fake_adapter(tmp_path / "a", "red"))
    config = fake_config(
        process=ProcessConfig(watchdog_timeout=2.0),
        adapter=AdapterConfig(adapter_root=str(tmp_path)),
    )
    late = "worker 0 has not finished loading it within 120 s"
    end = f"^worker 0 has not finished loading the adapter at {path} within 122 s, nor any that"
    with (
        running_engine(config, "--delay", "0.05", "--keep-loads") as engine,
        Client(engine.endpoint) as client,
    ):
        left = leftovers(engine)
        client.load_adapter("a", path)
        with pytest.raises(AdapterError, match=f"adapter 'a' at {path} cannot .* now: {late}"):
            list(client.generate([3], SHORT, adapter="a"))
        (*_, output) = client.generate([3], SHORT)
        assert output.outputs[0].token_ids == expected_tokens([3], max_tokens=5)
        with pytest.raises(EngineDeadError, match=end):
            raise Waiting(engine, [3]).begin().join()
        assert engine.wait(GUARD_S) == 1
        assert_gone(left)


def test_a_slow_but_living_step_is_left_alone() -> None:
    """Each step takes twice the time limit, and marks its layers as it goes."""
    config = fake_config(process=ProcessConfig(watchdog_timeout=2.5))
    with (
        running_engine(config, "--delay", "5", "--layers", "10") as engine,
        Client(engine.endpoint) as client,
    ):
        (*_, output) = client.generate([3], SamplingParams(max_tokens=3))
        assert output.outputs[0].token_ids == expected_tokens([3], max_tokens=3)
        assert engine.dead_reason is None


def test_health_tells_the_age_of_the_last_step() -> None:
    with running_engine(fake_config(), "--delay", "0.05") as engine:
        with Client(engine.endpoint) as client:
            assert client.health()["last_step_age_s"] is None
            for _ in client.generate([3], SHORT):
                pass
            health = client.health()
            assert (health["steps_in_flight"], health["unfinished_requests"]) == (0, 0)
            first = health["last_step_age_s"]
            assert first is not None and client.health()["last_step_age_s"] > first
            request_id = client.submit([3], LONG)
            wait_until(lambda: client.health()["steps_in_flight"] > 0)
            os.kill(engine.pids["worker 0"], signal.SIGSTOP)
            seen: list[float] = []
            while len(seen) < 3:  # it ages under load, and no step makes it young again
                health = client.health()
                assert health["unfinished_requests"] == 1 and health["steps_in_flight"] > 0
                if health["last_step_age_s"] > (seen[-1] if seen else 0.5):
                    seen.append(health["last_step_age_s"])
            assert request_id
        assert engine.wait(GUARD_S) == 1


def test_the_watchdog_can_be_switched_off() -> None:
    config = fake_config(process=ProcessConfig(watchdog_timeout=0))
    assert sys.gettrace() is None
    with running_engine(config) as engine, Client(engine.endpoint) as client:
        os.kill(engine.pids["worker 0"], signal.SIGSTOP)
        client.submit([3], SHORT)
        assert client.poll(5.0) == []
        os.kill(engine.pids["worker 0"], signal.SIGCONT)
        (result,) = client.poll(GUARD_S)
        assert result.outputs[0].token_ids == expected_tokens([3], max_tokens=5)


CLIENT = """
import subprocess
import sys
from loraplex.engine.errors import LoraplexError
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.entrypoints.client.sync_client import Client
client = Client(sys.argv[1])
try:
    for output in client.generate([3], SamplingParams(max_tokens=500)):
        print("begun", flush=True)
except LoraplexError as error:
    print("failed:", type(error).__name__, flush=True)
for output in client.generate([3], SamplingParams(max_tokens=5), stream=False):
    print("ended:", output.outputs[0].token_ids, flush=True)
"""


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["private", "tcp"])
def test_a_stopped_client_loses_its_request_and_goes_on_with_an_error(scheme: str) -> None:
    endpoint = "" if scheme == "private" else "tcp://127.0.0.1:0"
    config = fake_config(server=ServerConfig(endpoint=endpoint))
    with running_engine(config, "--delay", "0.2") as engine, Client(engine.endpoint) as other:
        with subprocess.Popen(
            [sys.executable, "-c", CLIENT, engine.endpoint], stdout=subprocess.PIPE, text=True
        ) as client:
            try:
                assert client.stdout is not None
                for _ in range(15):  # 3 s: its first heartbeat, after 2 s, carries the TTL
                    assert client.stdout.readline() == "begun\n"
                client.send_signal(signal.SIGSTOP)
                wait_until(lambda: other.stats()["running"] == 0)
                assert other.stats()["finished"]["length"] == 0, "the request ran to its end"
                client.send_signal(signal.SIGCONT)
                said, _ = client.communicate(timeout=GUARD_S)
            finally:
                client.kill()
        assert "failed: ConnectionLostError" in said
        assert f"ended: {expected_tokens([3], max_tokens=5)}" in said
