"""Where the live views come from: a ZeroMQ client, or the events of an HTTP server."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from loraplex.engine.errors import EngineDeadError, LoraplexError
from loraplex.entrypoints.client.sync_client import Client
from loraplex.entrypoints.live.live_feed import PERIOD_S, POOL_CELLS, LiveFeed

View = dict[str, Any]


class LiveSource(Protocol):
    """A context manager that knows a running server."""

    def __enter__(self) -> "LiveSource": ...

    def __exit__(self, *exc_info: object) -> None: ...

    def views(self) -> Iterator[View]:
        """Yields views as docs/reference/http.md describes them.

        Raises:
            LoraplexError: the server does not answer, or refuses.
        """


class ZmqSource:
    """Asks the server itself, twice a second."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def __enter__(self) -> "ZmqSource":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._client.close()

    def views(self) -> Iterator[View]:
        feed = LiveFeed(Path(self._client.health()["model"]).name or "the packaged model")
        while True:
            if feed.needs_list:
                feed.add_list(self._client.list_adapters())
            feed.add_stats(self._client.stats(pool_cells=POOL_CELLS))
            yield feed.view()
            time.sleep(PERIOD_S)


class HttpSource:
    """Reads the events of GET /loraplex/live."""

    def __init__(self, url: str, *, key: str, timeout_s: float) -> None:
        """Connects.

        Raises:
            LoraplexError: nothing answers there, or the server refuses.
        """
        self._url = f"{url.rstrip('/')}/loraplex/live"
        request = urllib.request.Request(self._url)
        if key:
            request.add_header("Authorization", f"Bearer {key}")
        try:
            self._response = urllib.request.urlopen(request, timeout=timeout_s)
        except urllib.error.HTTPError as error:
            raise LoraplexError(f"{self._url}: {_reason(error)}") from None
        except OSError as error:
            raise EngineDeadError(
                f"no server answers at {url} ({error}): start one with `loraplex serve --http "
                "HOST:PORT`, or give its address with --endpoint"
            ) from None

    def __enter__(self) -> "HttpSource":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._response.close()

    def views(self) -> Iterator[View]:
        try:
            for line in self._response:
                if line.startswith(b"data: "):
                    view = json.loads(line.removeprefix(b"data: "))
                    if "error" in view:
                        raise EngineDeadError(view["error"]["message"])
                    yield view
        except OSError as error:
            raise EngineDeadError(f"{self._url}: {error}") from None
        raise EngineDeadError(f"{self._url}: the server has closed the connection")


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{error.code} {error.reason}"
