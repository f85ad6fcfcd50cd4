"""Adapters as tensors over ZeroMQ, and what stays of them when a process dies."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq
from safetensors.torch import load_file

from loraplex import AsyncClient, Client, SamplingParams
from loraplex.engine.config import ServerConfig
from loraplex.engine.processes.engine import Engine

from helpers.running.http_server import Served, http_config, make_models
from helpers.running.processes import is_alive, wait_until

pytestmark = pytest.mark.e2e

SCRIPT = Path(__file__).parents[2] / "helpers" / "torture" / "tensor_server.py"
SHM = Path("/dev/shm")
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("uploads")
    make_models(made)
    return made


@pytest.fixture(scope="module")
def served(root: Path) -> Iterator[Served]:
    server = ServerConfig(
        endpoint="tcp://127.0.0.1:0", allow_adapter_upload=True, max_message_bytes=1 << 16
    )
    engine = Engine(replace(http_config(root), server=server))
    engine.start()
    yield Served(engine, root)
    engine.stop()


def spare(root: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    config = json.loads((root / "spare" / "adapter_config.json").read_text())
    return config, load_file(root / "spare" / "adapter_model.safetensors")


def from_afar(endpoint: str) -> str:
    """Returns an address of the same server that does not look like one of this machine."""
    return endpoint.replace("127.0.0.1", "0.0.0.0")


def answer(client: Client, adapter: str) -> list[int]:
    *_, output = client.generate([5, 6, 7], GREEDY, adapter=adapter)
    return list(output.outputs[0].token_ids)


def start(*arguments: str) -> tuple["subprocess.Popen[bytes]", dict[str, Any]]:
    command = [sys.executable, "-P", str(SCRIPT), *arguments]
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert child.stdout is not None
    return child, json.loads(child.stdout.readline())


def test_tensors_in_memory_in_frames_and_in_files_are_equal(served: Served) -> None:
    with Client(served.engine.endpoint) as near, Client(from_afar(served.engine.endpoint)) as far:
        file = near.load_adapter("file", "spare")
        memory = near.load_adapter_tensors("memory", *spare(served.root))
        frames = far.load_adapter_tensors("frames", *spare(served.root))
        assert file["content_hash"] == memory["content_hash"] == frames["content_hash"]
        near.unload_adapter("file")
        assert answer(near, "memory") == answer(far, "frames") != answer(near, "")


def test_from_asyncio(served: Served) -> None:
    async def load(endpoint: str, name: str) -> dict[str, Any]:
        async with AsyncClient(endpoint) as client:
            return await client.load_adapter_tensors(name, *spare(served.root))

    near = asyncio.run(load(served.engine.endpoint, "near"))
    far = asyncio.run(load(from_afar(served.engine.endpoint), "far"))
    assert near["content_hash"] == far["content_hash"]


def test_any_language_sends_a_safetensors_file(served: Served) -> None:
    config = {**spare(served.root)[0], "r": 4}
    message = {"type": "load_adapter_tensors", "request_id": "r", "name": "raw", "config": config}
    content = (served.root / "spare" / "adapter_model.safetensors").read_bytes()
    pieces = [content[i : i + 50_000] for i in range(0, len(content), 50_000)]
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(served.engine.endpoint)
        socket.send_multipart([msgpack.packb(message), *pieces])
        assert socket.poll(60_000)
        reply = msgpack.unpackb(socket.recv())
    assert reply["type"] == "adapters" and reply["adapters"][0]["state"] == "ready"


def test_the_adapter_outlives_the_client_that_sent_it(served: Served) -> None:
    child, _ = start("load", served.engine.endpoint, "left", str(served.root / "spare"))
    child.kill()
    child.wait()
    with Client(served.engine.endpoint) as client:
        before = client.stats()["adapter_tensor_bytes"]
        client.load_adapter("file", "spare")
        assert answer(client, "left") == answer(client, "file")
        client.unload_adapter("left")
        assert client.stats()["adapter_tensor_bytes"] < before


def test_frontend_that_died_takes_no_tensors_with_it(served: Served) -> None:
    """Runs last in this file: it replaces the frontend."""
    with Client(served.engine.endpoint) as client:
        client.load_adapter_tensors("kept", *spare(served.root))
    pid = served.engine.pids["frontend 0"]
    os.kill(pid, 9)
    wait_until(lambda: served.engine.pids["frontend 0"] != pid)
    with Client(served.engine.endpoint) as client:
        client.load_adapter("file", "spare")
        assert answer(client, "kept") == answer(client, "file")


def test_nothing_stays_of_a_server_that_was_killed(root: Path) -> None:
    before = set(os.listdir(SHM))
    path = f"ipc://{root}/socket"
    server, known = start("serve", str(root), path)
    client, _ = start("load", path, "x", str(root / "spare"))
    server.kill()
    server.wait()
    wait_until(lambda: not any(map(is_alive, known["pids"].values())))
    client.kill()
    client.wait()
    assert set(os.listdir(SHM)) == before
