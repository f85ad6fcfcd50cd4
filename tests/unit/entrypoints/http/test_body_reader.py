"""A body that does not end is given up."""

import asyncio
from typing import Any

import pytest
from starlette.requests import Request

from loraplex.entrypoints.http.errors import HttpError
from loraplex.entrypoints.http.requests.bodies import DetokenizeBody
from loraplex.entrypoints.http.requests.body_reader import BodyReader

HEAD = {
    "type": "http",
    "method": "POST",
    "path": "/",
    "headers": [(b"content-type", b"application/json")],
}


def request(*parts: bytes, ends: bool = True) -> Request:
    """A request whose body comes in parts; without an end, nothing comes after them."""
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": part, "more_body": True} for part in parts
    ]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        if not ends:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": b"", "more_body": False}

    return Request(HEAD, receive)


def test_a_body_that_stops_coming_is_given_up() -> None:
    async def read() -> list[int]:
        reader = BodyReader(max_bytes=1000, patience_s=0.01)
        for parts in ((), (b'{"tokens": [',)):
            with pytest.raises(HttpError, match="too slowly") as error:
                await reader.read(request(*parts, ends=False), DetokenizeBody)
            assert error.value.status == 408
        reader = BodyReader(max_bytes=1000)
        return (await reader.read(request(b'{"tokens": [1,', b"2]}"), DetokenizeBody)).tokens

    assert asyncio.run(asyncio.wait_for(read(), 60)) == [1, 2]
