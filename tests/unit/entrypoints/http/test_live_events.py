"""One producer for all viewers, which asks nothing while nobody looks."""

import asyncio
from typing import Any

import msgspec
import pytest

from loraplex.entrypoints.http.errors import HttpError
from loraplex.entrypoints.http.live_events import MAX_VIEWERS, LiveEvents
from loraplex.entrypoints.live.live_feed import LiveFeed


class Engine:
    """Counts what it is asked; answers until it is `dead`."""

    def __init__(self) -> None:
        self.num_stats = 0
        self.dead = False

    async def ask(self, kind: str, **values: Any) -> dict[str, Any]:
        await asyncio.sleep(0)
        if self.dead:
            raise HttpError(503, "the engine was stopped")
        if kind == "list_adapters":
            return {"adapters": []}
        self.num_stats += 1
        return {"stats": {"running": self.num_stats}}


def make_events(engine: Engine) -> LiveEvents:
    return LiveEvents(engine.ask, lambda: LiveFeed("base"), period_s=0.001)


def running(event: bytes) -> int:
    head, _, data = event.partition(b"data: ")
    assert head == b"" and event.endswith(b"\n\n")
    return int(msgspec.json.decode(data)["load"]["running"])


async def watch(events: LiveEvents, count: int) -> list[int]:
    seen: list[int] = []
    stream = events.watch()
    async for event in stream:
        seen.append(running(event))
        if len(seen) == count:
            await stream.aclose()  # type: ignore[attr-defined]
            break
    return seen


def test_viewers_share_one_producer() -> None:
    async def run() -> None:
        engine = Engine()
        events = make_events(engine)
        seen = await asyncio.gather(*(watch(events, 5) for _ in range(8)))
        assert all(views == sorted(set(views)) for views in seen)
        assert engine.num_stats < 15  # 40 views were shown
        before = engine.num_stats
        await asyncio.sleep(0.02)
        assert engine.num_stats <= before + 1  # nobody looks
        assert len(await watch(events, 2)) == 2  # and somebody does again

    asyncio.run(run())


def test_a_viewer_that_reads_slowly_sees_the_newest_view() -> None:
    async def run() -> None:
        engine = Engine()
        stream = make_events(engine).watch()
        first = running(await anext(stream))
        await asyncio.sleep(0.05)
        asked = engine.num_stats
        assert running(await anext(stream)) >= asked - 1 > first + 1
        await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(run())


def test_the_stream_ends_with_the_reason_when_the_engine_does() -> None:
    async def run() -> None:
        engine = Engine()
        events = make_events(engine)
        stream = events.watch()
        await anext(stream)
        engine.dead = True
        rest = [event async for event in stream]
        assert b"the engine was stopped" in rest[-1]
        engine.dead = False
        assert len(await watch(events, 3)) == 3

    asyncio.run(run())


def test_the_number_of_viewers_is_bounded() -> None:
    async def run() -> None:
        events = make_events(Engine())
        streams = [events.watch() for _ in range(MAX_VIEWERS)]
        for stream in streams:
            await anext(stream)
        with pytest.raises(HttpError) as refused:
            await anext(events.watch())
        assert refused.value.status == 429
        for stream in streams:
            await stream.aclose()  # type: ignore[attr-defined]
        assert len(await watch(events, 1)) == 1

    asyncio.run(run())
