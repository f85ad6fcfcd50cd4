"""GET /metrics."""

import asyncio
import time

from starlette.requests import Request
from starlette.responses import Response

from loraplex.engine.stores.open_stores import cache_bytes
from loraplex.entrypoints.http.engine_link import EngineLink
from loraplex.entrypoints.metrics.exposition import CONTENT_TYPE, render
from loraplex.entrypoints.metrics.scrape import scrape_of

FRESH_S = 1.0
"""A text that is younger is sent again, so that many scrapers cost no more than one."""


class MetricsRoutes:
    """Answers with the engine's metrics, whichever of its HTTP servers is asked."""

    def __init__(self, link: EngineLink) -> None:
        self._link = link
        self._lock = asyncio.Lock()
        self._text = b""
        self._made_at = -FRESH_S

    async def metrics(self, request: Request) -> Response:
        """Answers in Prometheus' text format; 503 while the engine does not serve."""
        async with self._lock:
            self._link.check_serving()
            if time.monotonic() >= self._made_at + FRESH_S:
                self._text = await self._make()
                self._made_at = time.monotonic()
        return Response(self._text, media_type=CONTENT_TYPE)

    async def _make(self) -> bytes:
        link = self._link
        reply = await link.ask("stats", by_tier=True)
        counts = link.sum_counts()
        assert link.info is not None
        config = link.config
        scrape = scrape_of(
            reply["stats"],
            config=config,
            histograms=counts.requests.snapshot(),
            ends=counts.requests.ends,
            workers=link.info.workers,
            stores=counts.stores.snapshot() if config.store.adapter_stores else None,
            cache_bytes=await asyncio.to_thread(cache_bytes, config.store),
        )
        return await asyncio.to_thread(render, scrape)
