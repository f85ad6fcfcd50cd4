"""AsyncClient against a small server that answers when the test lets it."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from loraplex.engine.errors import EngineDeadError
from loraplex.entrypoints.client import async_client
from loraplex.entrypoints.client.async_client import AsyncClient
from loraplex.entrypoints.client.transport import SocketTransport

WITHIN_S = 120.0  # only a test that hangs gets there, on a busy machine too


class Server:
    """Answers `health` at once and one request at each `go`."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.go, self.asked = threading.Semaphore(0), threading.Semaphore(0)
        self.seen: list[str] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._thread.join(WITHIN_S)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        waiting: list[tuple[bytes, str]] = []
        with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
            socket.linger = 0
            socket.bind(self.endpoint)
            while not self._stopping:
                if socket.poll(10):
                    client, data = socket.recv_multipart()
                    message = msgpack.unpackb(data)
                    self.seen.append(message["type"])
                    if message["type"] == "health":
                        answer = {"type": "health", "request_id": message["request_id"]}
                        socket.send_multipart(
                            [client, msgpack.packb({**answer, "max_message_bytes": 1 << 20})]
                        )
                    elif message["type"] == "generate":
                        waiting.append((client, message["request_id"]))
                        self.asked.release()
                if waiting and self.go.acquire(blocking=False):
                    client, request_id = waiting.pop(0)
                    socket.send_multipart([client, msgpack.packb(output(request_id))])


def output(request_id: str) -> dict[str, Any]:
    completion = {"index": 0, "text": "a", "token_ids": [5], "finish_reason": "length",
                  "stop_reason": None}  # fmt: skip
    return {"type": "output", "request_id": request_id, "outputs": [completion], "finished": True,
            "usage": {"cached_tokens": 0}}  # fmt: skip


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(f"ipc://{tmp_path}/clients")
    yield server
    server.stop()


async def tokens_of(client: AsyncClient) -> list[int]:
    (output,) = [output async for output in client.generate([1])]
    return output.outputs[0].token_ids


class Transports:
    """Keeps the transports that clients open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: list[SocketTransport] = []
        monkeypatch.setattr(async_client, "SocketTransport", self._open)

    def _open(self, *args: Any, **options: Any) -> SocketTransport:
        self.opened.append(SocketTransport(*args, **options))
        return self.opened[-1]


def test_an_answer_that_arrives_while_another_message_is_sent_is_read(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeroMQ signals an arrival on the file descriptor once, and a send may consume the signal."""
    transports = Transports(monkeypatch)

    async def main() -> None:
        async with AsyncClient(server.endpoint) as client:
            asking = asyncio.create_task(tokens_of(client))
            while not server.asked.acquire(blocking=False):
                await asyncio.sleep(0.01)
            server.go.release()
            # Blocks the loop until the answer is there. This too consumes the signal.
            assert transports.opened[0].sockets[0].poll(int(WITHIN_S * 1000))
            await client.cancel("nobody")
            assert await asyncio.wait_for(asking, WITHIN_S) == [5]

    asyncio.run(main())


def test_the_loss_of_the_server_ends_all_who_wait(server: Server) -> None:
    async def main() -> None:
        async with AsyncClient(server.endpoint) as client:
            asking = [asyncio.create_task(tokens_of(client)) for _ in range(3)]
            while not server.asked.acquire(blocking=False):
                await asyncio.sleep(0.01)
            server.stop()
            for task in asking:
                with pytest.raises(EngineDeadError, match="was lost"):
                    await asyncio.wait_for(task, WITHIN_S)

    asyncio.run(main())


def test_leaving_ends_all_who_wait(server: Server) -> None:
    async def main() -> None:
        client = AsyncClient(server.endpoint)
        asking = asyncio.create_task(tokens_of(client))
        while not server.asked.acquire(blocking=False):
            await asyncio.sleep(0.01)
        await client.close()
        with pytest.raises(EngineDeadError, match="was closed"):
            await asyncio.wait_for(asking, WITHIN_S)
        server.go.release()  # its client has gone
        assert (await client.health())["type"] == "health"  # it connects again
        await client.close()

    asyncio.run(main())
    assert "bye" in server.seen
