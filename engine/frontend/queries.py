"""The commands of clients that wait for the scheduler's answer."""

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from loraplex.engine.errors import ClientError, QueueFullError, client_error
from loraplex.engine.frontend.protocol import error_reply
from loraplex.scheduler.adapters.store_names import PRIVATE, private_name

MAX_QUERIES = 1024  # of all clients together
_OWN = b""  # stands for a client in the frontend's own questions

Then = Callable[[list[dict[str, Any]] | ClientError], None]


@dataclass(slots=True)
class _Query:
    client: bytes
    tenant: str
    request_id: str
    reply_type: str
    rows_key: str
    rows: list[dict[str, Any]] = field(default_factory=list)  # of an answer not complete yet
    then: Then | None = None  # who takes the adapters or the error, if no client does


class QueryTable:
    """Knows who asked for what, and sends the answers."""

    def __init__(self, reply: Callable[[bytes, dict[str, Any]], None]) -> None:
        self._reply = reply
        self._queries: dict[int, _Query] = {}
        self._num_of: Counter[bytes | str] = Counter()  # by tenant, or client without one
        self._ids = itertools.count(1)

    def __contains__(self, query_id: int) -> bool:
        return query_id in self._queries

    def add(
        self,
        client: bytes,
        tenant: str,
        request_id: str,
        reply_type: str,
        *,
        rows_key: str = "resident_adapters",
    ) -> int:
        """Returns the id of a new query. The rows of statistics go under `rows_key`.

        Raises:
            QueueFullError: the tenant, or else the client, has as many as there are free places.
        """
        asker = tenant or client
        num_waiting = len(self._queries) - self._num_of[_OWN]
        if self._num_of[asker] >= MAX_QUERIES - num_waiting:
            raise QueueFullError("too many commands are waiting: try again later")
        self._num_of[asker] += 1
        query_id = next(self._ids)
        self._queries[query_id] = _Query(client, tenant, request_id, reply_type, rows_key)
        return query_id

    def ask(self, then: Then) -> int:
        """Returns the id of a question of the frontend itself, which `then` gets the answer to."""
        query_id = next(self._ids)
        self._queries[query_id] = _Query(_OWN, "", "", "", "", then=then)
        self._num_of[_OWN] += 1
        return query_id

    def add_rows(self, query_id: int, rows: list[dict[str, Any]]) -> None:
        """Keeps a part of an answer."""
        self._queries[query_id].rows += rows

    def answer(self, query_id: int, stats: dict[str, Any]) -> None:
        """Sends statistics, with the rows that came. They may name adapters of any tenant, so the
        operator alone gets them."""
        query = self._take(query_id)
        rows = [] if query.tenant else query.rows
        self._send(query, stats={**stats, query.rows_key: rows})

    def answer_adapters(self, query_id: int, adapters: list[dict[str, Any]]) -> None:
        """Sends adapters, after the rows that came. A tenant does not see the names of others, nor
        where files lie that are not its own and what is wrong with them."""
        query = self._take(query_id)
        rows = query.rows + adapters
        if query.then is not None:
            query.then(rows)
            return
        if query.tenant:
            rows = [_seen_by(query.tenant, row) for row in rows if _is_visible(query.tenant, row)]
        self._send(query, adapters=rows)

    def fail(self, query_id: int, code: str, text: str) -> None:
        """Sends an error."""
        query = self._take(query_id)
        if query.then is not None:
            query.then(client_error(code, text))
            return
        self._reply(query.client, error_reply(query.request_id, code, text))

    def fail_all(self, code: str, text: str) -> None:
        for query_id in list(self._queries):
            self.fail(query_id, code, text)

    def discard(self, query_id: int) -> None:
        """Forgets a query without an answer."""
        self._take(query_id)

    def _take(self, query_id: int) -> _Query:
        query = self._queries.pop(query_id)
        asker = query.tenant or query.client
        self._num_of[asker] -= 1
        if not self._num_of[asker]:
            del self._num_of[asker]
        return query

    def _send(self, query: _Query, **values: Any) -> None:
        head = {"type": query.reply_type, "request_id": query.request_id}
        self._reply(query.client, head | values)


def _is_visible(tenant: str, adapter: dict[str, Any]) -> bool:
    """Tells whether an adapter is not another tenant's alone."""
    name: str = adapter["name"]
    return not name.startswith(PRIVATE) or name.startswith(private_name(tenant, ""))


def _seen_by(tenant: str, adapter: dict[str, Any]) -> dict[str, Any]:
    if adapter["owner"] == tenant:
        return {**adapter, "name": adapter["name"].removeprefix(private_name(tenant, ""))}
    owner = None if adapter["owner"] else ""
    error = "its owner and the operator see the reason" if adapter["error"] else ""
    return {**adapter, "owner": owner, "path": None, "error": error, "warnings": []}
