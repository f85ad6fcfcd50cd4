"""Clients that send much and leave at once, while the frontend has not read it all."""

import threading
from typing import Any

import msgpack
import pytest
import zmq

from loraplex.engine.config import ServerConfig
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.engine.processes.engine import Engine
from loraplex.entrypoints.client.sync_client import Client

from helpers.fakes.fake_engine import expected_tokens, fake_config
from helpers.running.processes import running_engine

pytestmark = pytest.mark.e2e
NUM_ROUNDS, NUM_MESSAGES, NUM_CLIENTS = 300, 200, 2


def send_and_leave(engine: Engine, context: "zmq.Context[Any]") -> None:
    for number in range(NUM_ROUNDS):
        with context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.connect(engine.endpoint)
            for message in range(NUM_MESSAGES):
                name = f"n{number}-{message}"
                command = {"type": "load_adapter", "request_id": "r", "name": name,
                           "path": "/none", "lazy": True}  # fmt: skip
                socket.send(msgpack.packb(command))
            socket.poll(1000)


def test_frontend_outlives_them() -> None:
    """With libzmq's heartbeats on the server's socket, some of these rounds abort the frontend."""
    server = ServerConfig(endpoint="tcp://127.0.0.1:0")
    with running_engine(fake_config(server=server)) as engine, zmq.Context() as context:
        pids = dict(engine.pids)
        threads = [
            threading.Thread(target=send_and_leave, args=(engine, context))
            for _ in range(NUM_CLIENTS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with Client(engine.endpoint) as client:
            params = SamplingParams(max_tokens=4, temperature=0.0)
            *_, output = client.generate([1, 2], params)
            assert output.outputs[0].token_ids == expected_tokens([1, 2], max_tokens=4)
        assert engine.pids == pids
