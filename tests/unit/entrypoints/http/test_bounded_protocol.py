"""Heads of requests that do not end, against a server on this machine."""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable

import uvicorn

from loraplex.entrypoints.http import bounded_protocol
from loraplex.entrypoints.http.bounded_protocol import BoundedProtocol

GUARD_S = 60.0
REQUEST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n" + b"b" * 200_000
Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


async def answer(scope: object, receive: Callable[[], Awaitable[dict]], send: Callable) -> None:  # type: ignore[type-arg]
    """Reads the body, and answers with its size."""
    size = 0
    while (message := await receive())["type"] == "http.request":
        size += len(message["body"])
        if not message["more_body"]:
            break
    text = str(size).encode()
    headers = [(b"content-length", str(len(text)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": text})


def serve(test: Callable[[Connect], Awaitable[None]], *, head_s: float = GUARD_S) -> None:
    class Protocol(BoundedProtocol):
        pass

    Protocol.head_s = head_s

    async def run() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(answer, http=Protocol, lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext  # type: ignore[assignment]
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            await test(lambda: asyncio.open_connection(*listener.getsockname()))
        finally:
            server.should_exit = True
            await serving

    asyncio.run(asyncio.wait_for(run(), GUARD_S))


def test_a_head_that_does_not_come_is_given_up() -> None:
    async def test(connect: Connect) -> None:
        for begin in (b"", b"GET / HTTP/1.1\r\nHost:", b"\r\n\r\n"):
            reader, writer = await connect()
            writer.write(begin)
            assert await reader.read() == b"", begin
            writer.close()

    serve(test, head_s=0.05)


def test_a_head_has_a_largest_size() -> None:
    async def test(connect: Connect) -> None:
        reader, writer = await connect()
        writer.write(b"GET / HTTP/1.1\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(4 * bounded_protocol.MAX_HEAD_BYTES // 1000):
                writer.write(b"x: " + b"y" * 995 + b"\r\n")
                await writer.drain()
        with contextlib.suppress(ConnectionError):  # a reset may come before the answer is read
            assert b" 431 " in await reader.readline()
        writer.close()

    serve(test)


def test_bodies_and_later_requests_of_a_connection_are_not_bounded_by_it() -> None:
    async def test(connect: Connect) -> None:
        reader, writer = await connect()
        for _ in range(3):
            writer.write(REQUEST)
            assert b" 200 " in await reader.readline()
            await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(6) == b"200000"
        writer.close()

    serve(test)
