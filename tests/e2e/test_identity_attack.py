"""A client that claims the number which libzmq will give to another peer."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq
import zmq.auth

from loraplex.engine.config import ServerConfig
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.entrypoints.client.sync_client import Client

from helpers.fakes.fake_engine import expected_tokens, fake_config
from helpers.running.processes import GUARD_S, running_engine

pytestmark = pytest.mark.e2e
NUM_DRAWS, NUM_NEXT, NUM_NEWCOMERS = 5, 11, 15  # 70 connections

# Draws as libzmq does: two numbers of libc's rand() that nobody has seeded.
DRAW_UNSEEDED = f"""
import ctypes
rand = ctypes.CDLL(None).rand
for _ in range({NUM_DRAWS}):
    low, high = rand(), rand()
    print((high << 31 | low) & 0xFFFFFFFF)
"""


def coming_numbers() -> list[int]:
    """Returns the numbers that an unseeded server gives to its next peers."""
    drawn = subprocess.run(
        [sys.executable, "-c", DRAW_UNSEEDED], capture_output=True, text=True, check=True
    )
    return [int(line) + i for line in drawn.stdout.split() for i in range(5, 5 + NUM_NEXT)]


@pytest.mark.parametrize("encrypted", [False, True])
def test_no_client_can_end_the_frontend_with_a_guessed_number(
    encrypted: bool, tmp_path: Path
) -> None:
    secret, server_key = "", None
    if encrypted:
        zmq.auth.create_certificates(str(tmp_path), "server")
        secret, server_key = str(tmp_path / "server.key_secret"), str(tmp_path / "server.key")
    server = ServerConfig(endpoint="tcp://127.0.0.1:0", server_secret_key_file=secret)
    with running_engine(fake_config(server=server)) as engine, zmq.Context() as context:
        pids = dict(engine.pids)
        sockets: list[Any] = []

        def connect(identity: bytes) -> Any:
            socket = context.socket(zmq.DEALER)
            sockets.append(socket)
            socket.linger = 0
            if identity:
                socket.setsockopt(zmq.IDENTITY, identity)
            if server_key is not None:
                public, _ = zmq.auth.load_certificate(server_key)
                socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
                socket.curve_serverkey = public
            socket.connect(engine.endpoint)
            socket.send(msgpack.packb({"type": "ping"}))
            return socket

        squatters = [connect(b"\0" + n.to_bytes(4, "big")) for n in coming_numbers()]
        for socket in squatters:
            assert socket.poll(GUARD_S * 1000), "the server does not answer"
        newcomers = [connect(b"") for _ in range(NUM_NEWCOMERS)]
        for socket in newcomers:
            assert socket.poll(GUARD_S * 1000), "the server does not answer"
            assert msgpack.unpackb(socket.recv())["type"] == "pong"
        with Client(engine.endpoint, server_public_key=server_key) as client:
            params = SamplingParams(max_tokens=4, temperature=0.0)
            *_, output = client.generate([1, 2], params)
            assert output.outputs[0].token_ids == expected_tokens([1, 2], max_tokens=4)
        assert engine.pids == pids
        for socket in sockets:
            socket.close()
