"""Exchanges keep a bounded number of bytes for clients that do not read."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from loraplex.engine.frontend.byte_budget import ByteBudget
from loraplex.entrypoints.http.errors import HttpError
from loraplex.entrypoints.http.exchange import Exchange, ExchangeTable, Query


class Requests:
    """Records whose requests were cancelled."""

    def __init__(self) -> None:
        self.dropped: list[bytes] = []

    def has_requests(self, client: bytes) -> bool:
        return client not in self.dropped

    def drop_client(self, client: bytes) -> list[str]:
        self.dropped.append(client)
        return []


class Echo:
    """An answer whose bytes are the texts of the replies, and a dot at the end."""

    request_id = "r"
    model = "m"
    streams = True

    def add(self, index: int, reply: dict[str, Any]) -> bytes:
        text: bytes = reply["text"]
        if text == b"fault":
            raise ValueError("a fault of the answer")
        return b"%d%b " % (index, text)

    def end(self) -> bytes:
        return b"."


def output(text: bytes, index: int = 0, finished: bool = False) -> dict[str, Any]:
    return {"type": "output", "request_id": str(index), "text": text, "finished": finished}


def error(code: str) -> dict[str, Any]:
    return {"type": "error", "request_id": "0", "code": code, "message": f"{code}!"}


class World:
    def __init__(self, *, for_each: int = 100, in_all: int = 250) -> None:
        self.requests = Requests()
        self.table = ExchangeTable(self.requests, ByteBudget(for_each=for_each, in_all=in_all))

    def exchange(self, num_prompts: int = 1) -> Exchange:
        return Exchange(self.table, Echo(), num_prompts)

    def reply(self, exchange: Exchange, *replies: dict[str, Any]) -> None:
        for reply in replies:
            self.table.reply(exchange.client, reply)


def in_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), 60))

    run.__name__ = test.__name__
    return run


async def fails(exchange: Exchange, status: int, text: str) -> None:
    with pytest.raises(HttpError, match=text) as caught:
        await exchange.read()
    assert caught.value.status == status


@in_loop
async def test_bytes_come_joined_and_end_when_all_prompts_have_finished() -> None:
    world = World()
    exchange = world.exchange(2)
    world.reply(exchange, output(b"a"), output(b"b", 1, finished=True))
    assert await exchange.read() == b"0a 1b "
    reading = asyncio.create_task(exchange.read())
    await asyncio.sleep(0)
    assert not reading.done()
    world.reply(exchange, output(b"c", finished=True))
    assert await reading == b"0c ."
    assert exchange.ended and await exchange.read() == b""
    exchange.close()
    assert world.table.num_unread_bytes == world.table.num_lost == len(world.table) == 0


@in_loop
async def test_who_leaves_too_much_unread_is_cut_off() -> None:
    world = World()
    slow, other = world.exchange(), world.exchange()
    world.reply(other, output(b"x"))
    for _ in range(8):
        world.reply(slow, output(b"y" * 20))
        assert world.table.num_unread_bytes <= 100 + len(b"0x ")
    await fails(slow, 500, "left too much of the stream unread")
    assert world.requests.dropped == [slow.client]
    assert await other.read() == b"0x "
    assert world.table.num_unread_bytes == 0 and world.table.num_slow == 1


@in_loop
async def test_the_largest_is_cut_off_when_all_together_leave_too_much() -> None:
    world = World(for_each=100, in_all=150)
    large, small, new = (world.exchange() for _ in range(3))
    world.reply(large, output(b"l" * 90))
    world.reply(small, output(b"s" * 40))
    world.reply(new, output(b"n" * 40))
    await fails(large, 500, "unread")
    assert await small.read() == b"0" + b"s" * 40 + b" "
    assert await new.read() == b"0" + b"n" * 40 + b" "
    assert world.table.num_unread_bytes == 0


@in_loop
async def test_one_large_answer_passes() -> None:
    world = World(for_each=10, in_all=1000)
    exchange = world.exchange()
    world.reply(exchange, output(b"z" * 500))
    assert len(await exchange.read()) == 502


@in_loop
async def test_a_client_that_leaves_cancels_its_requests() -> None:
    world = World()
    exchange = world.exchange()
    world.reply(exchange, output(b"a"))
    exchange.close()
    assert world.requests.dropped == [exchange.client]
    assert world.table.num_lost == 1 and world.table.num_unread_bytes == 0
    world.reply(exchange, output(b"late", finished=True))
    assert await exchange.read() == b""


@in_loop
async def test_errors_end_an_answer_and_what_else_it_waits_for() -> None:
    world = World()
    for code, status in (("queue_full", 429), ("unknown_adapter", 404), ("engine_dead", 503)):
        exchange = world.exchange(2)
        world.reply(exchange, output(b"a"), error(code), output(b"b", 1, finished=True))
        await fails(exchange, status, "does not exist" if status == 404 else f"{code}!")
        assert exchange.client in world.requests.dropped
    faulty = world.exchange()
    world.reply(faulty, output(b"fault"))
    await fails(faulty, 500, "internal error")


@in_loop
async def test_a_query_has_one_reply() -> None:
    world = World()
    query = Query()
    client = world.table.add(query)
    world.table.reply(client, {"type": "adapters", "adapters": []})
    world.table.reply(client, error("internal"))
    assert (await query.reply)["type"] == "adapters"
    refused = Query()
    world.table.reply(world.table.add(refused), error("forbidden"))
    with pytest.raises(HttpError) as caught:
        await refused.reply
    assert caught.value.status == 403
