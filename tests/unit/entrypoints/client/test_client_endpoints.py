"""Addresses that cannot be one are refused at once, with the form that they need."""

import asyncio
import contextlib
import socket
import threading
from pathlib import Path

import pytest
import zmq

from loraplex.engine.config import EngineConfig, ModelConfig
from loraplex.engine.errors import ConfigError, EngineDeadError
from loraplex.engine.processes.engine import Engine
from loraplex.entrypoints.client.async_client import AsyncClient
from loraplex.entrypoints.client.sync_client import Client
from loraplex.entrypoints.client.transport import SocketTransport


@pytest.mark.parametrize(
    "endpoint", ["nonsense", "localhost:5599", "tcp://localhost", "http://127.0.0.1:8000", "ipc://"]
)
def test_an_endpoint_without_scheme_or_port_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=f"tcp://HOST:PORT or ipc://PATH, got '{endpoint}'"):
        Client(endpoint)


@pytest.mark.parametrize("endpoint", ["tcp://localhost:5599", "tcp://[::1]:5599", "ipc:///tmp/x"])
def test_addresses_that_may_be_one_are_tried(endpoint: str) -> None:
    SocketTransport(endpoint).close()


def test_an_engine_without_a_model_starts_no_process() -> None:
    engine = Engine(EngineConfig(model=ModelConfig(model="/no/such/model")))
    with pytest.raises(ConfigError, match="/no/such/model does not exist"):
        engine.start()
    assert not engine.pids


def test_clients_say_that_no_server_was_reached(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/none"
    text = f"no server was reached at {endpoint} in 0.3 s: start one with `loraplex serve`"

    async def connect() -> None:
        async with AsyncClient(endpoint, timeout_s=0.3):
            pass

    with pytest.raises(EngineDeadError, match=text):
        Client(endpoint, timeout_s=0.3)
    with pytest.raises(EngineDeadError, match=text):
        asyncio.run(connect())


def test_a_server_that_does_not_answer_was_reached(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/silent"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as server:
        server.linger = 0
        server.bind(endpoint)
        with pytest.raises(EngineDeadError, match=f"no answer to 'health' from {endpoint} in 4 s"):
            Client(endpoint, timeout_s=4.0)


def test_a_server_of_another_protocol_is_named() -> None:
    """An HTTP server answers a ZeroMQ greeting with an error, and closes the connection."""

    def answer() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n" * 9)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer, daemon=True).start()
        endpoint = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(EngineDeadError, match=f"{endpoint}.*no ZeroMQ.*HTTP port"):
            Client(endpoint, timeout_s=20.0)
        server.shutdown(socket.SHUT_RDWR)
