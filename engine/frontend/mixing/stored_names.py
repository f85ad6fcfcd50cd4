"""Finds what a name means that comes without a folder: registered, in a store, or nowhere.

The scheduler alone knows what is registered, so it is asked before a store is. What it has told is
believed for REGISTERED_S. A name that another tenant has registered comes after the stores.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from loraplex.engine.errors import ClientError, UnknownAdapterError
from loraplex.engine.frontend.queries import QueryTable
from loraplex.engine.frontend.scheduler_link import SchedulerLink
from loraplex.engine.ipc.messages.frontend import AdapterCommand
from loraplex.engine.stores.store_lookup import Answer, Found, StoreLookup

REGISTERED_S = 5.0
MAX_REGISTERED = 10_000

Key = tuple[str, str]  # name, tenant


class StoredNames:
    """Answers for one frontend; all methods are called in its thread."""

    def __init__(
        self,
        stores: StoreLookup,
        queries: QueryTable,
        scheduler: SchedulerLink,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stores = stores
        self._queries = queries
        self._scheduler = scheduler
        self._clock = clock
        self._registered: dict[Key, float] = {}  # when the scheduler told so
        self._asked: dict[Key, list[Found]] = {}  # who waits for the scheduler

    def find(self, name: str, tenant: str, then: Found) -> None:
        """Calls `then` with what a store has, None if the name is registered, or with the reason
        why there is no adapter. It calls now or later."""
        key = (name, tenant)
        if self._stores.has_found(name, tenant):
            self._stores.find(name, tenant, then)
        elif self._clock() - self._registered.get(key, -REGISTERED_S) < REGISTERED_S:
            then(None)
        elif key in self._asked:
            self._asked[key].append(then)
        else:
            self._ask(key, then)

    def _ask(self, key: Key, then: Found) -> None:
        name, tenant = key
        query_id = self._queries.ask(partial(self._on_reply, key))
        try:
            self._scheduler.send(AdapterCommand(query_id, "list", name, tenant=tenant))
        except ClientError as error:
            self._queries.discard(query_id)
            then(error)
        else:
            self._asked[key] = [then]

    def _on_reply(self, key: Key, reply: list[dict[str, Any]] | ClientError) -> None:
        name, tenant = key
        waiting = self._asked.pop(key)
        self._registered.pop(key, None)
        row = reply[0] if isinstance(reply, list) and reply else None
        if isinstance(reply, ClientError) and reply.code != UnknownAdapterError.code:
            for then in waiting:
                then(reply)
            return
        is_registered = row is not None and not row["is_from_store"]
        if row is not None and is_registered and row["owner"] in ("", tenant):
            if len(self._registered) >= MAX_REGISTERED:
                self._registered.clear()
            self._registered[key] = self._clock()
            for then in waiting:
                then(None)
            return
        for then in waiting:
            self._stores.find(name, tenant, partial(self._on_found, name, then, is_registered))

    def _on_found(self, name: str, then: Found, is_registered: bool, answer: Answer) -> None:
        """Passes a store's answer on; nothing found is an error unless another tenant has it."""
        if answer is None and not is_registered:
            roots = ", ".join(self._stores.roots)
            answer = UnknownAdapterError(
                f"no adapter is registered as {name!r}, and no store has it: {roots}"
            )
        then(answer)
