"""Sends the live view of the engine as events. One producer serves all viewers."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from loraplex.entrypoints.http.answers.base_answer import event
from loraplex.entrypoints.http.errors import HttpError
from loraplex.entrypoints.live.live_feed import PERIOD_S, POOL_CELLS, LiveFeed

MAX_VIEWERS = 64

Ask = Callable[..., Awaitable[dict[str, Any]]]


class LiveEvents:
    """Asks the engine twice a second while somebody looks, and never while nobody does.

    A viewer that reads slowly misses views; nothing is kept for it.
    """

    def __init__(self, ask: Ask, feed: Callable[[], LiveFeed], *, period_s: float = PERIOD_S):
        """`ask` sends a command to the engine, as EngineLink.ask() does."""
        self._ask = ask
        self._make_feed = feed
        self._period_s = period_s
        self._num_viewers = 0
        self._producer: asyncio.Task[None] | None = None
        self._event = b""
        self._number = 0  # of the event
        self._changed = asyncio.Event()

    async def watch(self) -> AsyncIterator[bytes]:
        """Yields events until the viewer leaves. The last one says why if the engine does not
        answer.

        Raises:
            HttpError: MAX_VIEWERS look already (status 429).
        """
        self.check_room()
        self._num_viewers += 1
        if self._producer is None or self._producer.done():
            self._producer = asyncio.create_task(self._produce())
        producer, seen = self._producer, self._number
        try:
            while True:
                while self._number == seen and not producer.done():
                    await self._changed.wait()
                if self._number != seen:
                    seen = self._number
                    yield self._event
                if producer.done():
                    return
        finally:
            self._num_viewers -= 1
            if not self._num_viewers:
                producer.cancel()
                self._producer = None

    def check_room(self) -> None:
        """Raises HttpError (status 429) if MAX_VIEWERS look already."""
        if self._num_viewers >= MAX_VIEWERS:
            raise HttpError(429, f"{MAX_VIEWERS} viewers look at this process already")

    async def _produce(self) -> None:
        try:
            feed = self._make_feed()
            while True:
                if feed.needs_list:
                    feed.add_list((await self._ask("list_adapters"))["adapters"])
                feed.add_stats((await self._ask("stats", pool_cells=POOL_CELLS))["stats"])
                self._publish(event(feed.view()))
                await asyncio.sleep(self._period_s)
        except HttpError as error:
            self._publish(event(error.body))
        finally:
            asyncio.get_running_loop().call_soon(self._wake)  # the task is done by then

    def _publish(self, data: bytes) -> None:
        self._event = data
        self._number += 1
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
