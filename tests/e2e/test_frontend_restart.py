"""A frontend that dies is started again; its clients lose their requests and go on."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from loraplex.engine.config import AdapterConfig, ServerConfig
from loraplex.engine.errors import ConnectionLostError, EngineDeadError
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.engine.processes.engine import Engine
from loraplex.engine.processes.restart_policy import MAX_DEATHS
from loraplex.entrypoints.client.outputs import RequestFailure
from loraplex.entrypoints.client.sync_client import Client

from helpers.fakes.fake_engine import expected_tokens, fake_config, make_fake_adapter
from helpers.running.processes import assert_gone, leftovers, running_engine, wait_until

pytestmark = pytest.mark.e2e
LONG = SamplingParams(max_tokens=500)
SHORT = SamplingParams(max_tokens=6)
WAIT_S = 60.0


def kill_frontend(engine: Engine) -> None:
    os.kill(engine.pids["frontend 0"], signal.SIGKILL)


class Waiting:
    """A client in a thread whose long request fails, and which then asks again."""

    def __init__(self, engine: Engine, prompt: int, *, stream: bool, adapter: str) -> None:
        self.error: BaseException | None = None
        self.tokens: list[int] = []
        self._client = Client(engine.endpoint, timeout_s=WAIT_S)
        self._prompt, self._stream, self._adapter = [prompt], stream, adapter
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._begun.wait(WAIT_S)

    def _run(self) -> None:
        try:
            self._ask_long()
        except ConnectionLostError as error:
            self.error = error
        for output in self._client.generate(self._prompt, SHORT, adapter=self._adapter):
            self.tokens = list(output.outputs[0].token_ids)
        self._client.close()

    def _ask_long(self) -> None:
        if self._stream:
            for _ in self._client.generate(self._prompt, LONG, adapter=self._adapter):
                self._begun.set()
            return
        self._client.submit(self._prompt, LONG, adapter=self._adapter)
        self._client.health()
        self._begun.set()
        (result,) = self._client.poll(WAIT_S)
        assert isinstance(result, RequestFailure)
        raise result.error

    def join(self) -> None:
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive(), "it still waits"


@pytest.mark.parametrize("scheme", ["private", "ipc", "tcp"])
def test_clients_of_a_dead_frontend_fail_and_are_served_again(scheme: str, tmp_path: Path) -> None:
    endpoints = {"private": "", "ipc": f"ipc://{tmp_path}/served", "tcp": "tcp://127.0.0.1:0"}
    path = make_fake_adapter(tmp_path / "adapter", "some content")
    config = fake_config(
        server=ServerConfig(endpoint=endpoints[scheme]),
        adapter=AdapterConfig(adapters=(("x", str(path)),)),
    )
    with running_engine(config, "--delay", "0.02") as engine:
        waiting = [
            Waiting(engine, 5 + i, stream=i % 2 == 0, adapter="x" if i > 1 else "")
            for i in range(4)
        ]
        endpoint, former = engine.endpoint, engine.pids["frontend 0"]
        kill_frontend(engine)
        for i, client in enumerate(waiting):
            client.join()
            assert isinstance(client.error, ConnectionLostError)
            content = "some content" if i > 1 else ""
            assert client.tokens == expected_tokens([5 + i], content, max_tokens=6)
        assert engine.endpoint == endpoint and engine.pids["frontend 0"] != former
        assert engine.wait(0) is None and engine.dead_reason is None
        with Client(endpoint, timeout_s=WAIT_S) as client:
            wait_until(lambda: num_requests(client) == 0, WAIT_S)
        left = leftovers(engine)
    assert_gone(left)


def num_requests(client: Client) -> int:
    stats: dict[str, Any] = client.stats()
    return int(stats["running"] + stats["waiting"])


def test_a_frontend_that_dies_again_and_again_ends_the_engine() -> None:
    with running_engine(fake_config(), "--delay", "0.02") as engine:
        client = Client(engine.endpoint, timeout_s=WAIT_S)
        client.submit([5], LONG)
        killed: set[int] = set()
        for _ in range(MAX_DEATHS):
            wait_until(lambda: engine.pids["frontend 0"] not in killed, WAIT_S)
            killed.add(engine.pids["frontend 0"])
            kill_frontend(engine)
        assert engine.wait(WAIT_S) == 1
        assert engine.dead_reason == (
            "frontend 0 was killed by signal 9 (SIGKILL), for the 5th time within 60 s"
        )
        (result,) = client.poll(WAIT_S)
        assert isinstance(result, RequestFailure) and isinstance(result.error, EngineDeadError)
        client.close()


def test_the_scheduler_may_die_while_a_frontend_starts_again() -> None:
    with running_engine(fake_config()) as engine:
        kill_frontend(engine)
        former = engine.pids["frontend 0"]
        wait_until(lambda: engine.pids["frontend 0"] != former, WAIT_S)
        os.kill(engine.pids["scheduler"], signal.SIGKILL)
        left = leftovers(engine)
        assert engine.wait(WAIT_S) == 1
        assert "scheduler was killed by signal 9" in str(engine.dead_reason)
        assert_gone(left)
