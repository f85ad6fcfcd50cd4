"""Which adapters are known by which name, and what inspecting their files brought.

A record is one version of one name. Requests are bound to the record that the name meant when
they arrived, so replacing an adapter never mixes two contents in one answer.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from heapq import nsmallest
from typing import TYPE_CHECKING, Any

from loraplex.scheduler.plan import AdapterInspected, InspectAdapter
from loraplex.scheduler.request import RequestRefused

if TYPE_CHECKING:
    from loraplex.scheduler.service import ServiceStats

MAX_LISTED = 20  # names in an error


class AdapterState(Enum):
    REGISTERED = "registered"  # the path is known, nothing was read yet
    INSPECTING = "inspecting"
    READY = "ready"  # content hash and size are known
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class Adapter:
    """One version of a named adapter."""

    name: str
    path: str
    generation: int
    state: AdapterState = AdapterState.REGISTERED
    is_named: bool = False  # new requests for `name` get this version
    is_unloaded: bool = False  # unloaded before it was inspected
    error: str = ""
    content_hash: str = ""
    num_pages: int = 0
    num_bytes: int = 0
    max_rank: int = 0
    modules: list[str] = field(default_factory=list)
    num_requests: int = 0  # unfinished ones
    reply_keys: list[Hashable] = field(default_factory=list)  # who awaits the inspection
    pin_keys: list[Hashable] = field(default_factory=list)  # who awaits it to have it pinned
    wants_pin: bool = False  # to be pinned once it is inspected
    is_pinned: bool = False
    last_use: float = -1.0  # seconds: when a request came or ended last; negative: never
    service: "ServiceStats | None" = None  # of the name; shared by its versions


@dataclass(slots=True)
class AdapterUpdate:
    """The outcome of load_adapter() or pin_adapter(), for whoever gave `reply_key`."""

    reply_key: Hashable
    name: str
    error: str = ""
    error_code: str = ""
    adapter: dict[str, Any] = field(default_factory=dict)


class AdapterRegistry:
    """Name -> record. Emits InspectAdapter through `send`. `orphan` is told a content hash that no
    name and no request refers to any more; `retire` a record before it loses its name, and the one
    that takes its place, if any."""

    def __init__(
        self,
        *,
        max_pages: int,
        send: Callable[[InspectAdapter], None],
        orphan: Callable[[str], None],
        retire: Callable[[Adapter, Adapter | None], None],
    ) -> None:
        self._max_pages = max_pages
        self._send = send
        self._retired = retire
        self._orphan = orphan
        self._by_name: dict[str, Adapter] = {}
        self._by_hash: dict[str, list[Adapter]] = {}  # READY records that are named or in use
        self._inspecting: dict[tuple[str, str], deque[Adapter]] = {}
        self._num_created = 0

    def __len__(self) -> int:
        return len(self._by_name)

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self._by_name.values())

    def with_hash(self, content_hash: str) -> list[Adapter]:
        return self._by_hash.get(content_hash, [])

    def register(self, name: str, path: str) -> Adapter:
        """Remember a path, to be read on first use. The same path again changes nothing, unless
        reading it had failed."""
        record = self._by_name.get(name)
        if record and record.path == path and record.state is not AdapterState.FAILED:
            return record
        record = self._create(name, path)
        self._set_current(record)
        return record

    def load(self, name: str, path: str, reply_key: Hashable) -> Adapter:
        """Inspect `path` now. The version that the name has goes on serving until the new one is
        found good; where there is none, or it has failed, new requests wait for the new one."""
        current = self._by_name.get(name)
        record = self._create(name, path)
        record.reply_keys.append(reply_key)
        if current is None or current.state is AdapterState.FAILED:
            self._set_current(record)
        self.inspect_once(record)
        return record

    def unload(self, name: str) -> Adapter:
        """Forget a name; requests that have its records keep them."""
        record = self.find(name)
        del self._by_name[name]
        for (inspected_name, _), pending in self._inspecting.items():
            if inspected_name == name:
                for other in pending:
                    other.is_unloaded = True
        self._retire(record, None)
        return record

    def find(self, name: str) -> Adapter:
        """The record that a name means now.

        Raises:
            RequestRefused: the name is unknown.
        """
        record = self._by_name.get(name)
        if record is None:
            raise self._unknown(name)
        return record

    def resolve(self, name: str) -> Adapter:
        """The record for a new request.

        Raises:
            RequestRefused: the name is unknown, or its adapter could not be read.
        """
        record = self.find(name)
        if record.state is AdapterState.FAILED:
            raise RequestRefused("adapter", f"{failure(record)}; load it again once it is mended")
        return record

    def bind(self, record: Adapter, now: float) -> None:
        """Count a request of this record; the first one has the files inspected."""
        record.num_requests += 1
        record.last_use = now
        self.inspect_once(record)

    def inspect_once(self, record: Adapter) -> None:
        """Have the files inspected unless they were, or are being."""
        if record.state is AdapterState.REGISTERED:
            self._inspect(record)

    def unbind(self, record: Adapter, now: float) -> None:
        record.num_requests -= 1
        record.last_use = now
        self._forget_unused(record)

    def on_inspected(self, event: AdapterInspected) -> tuple[Adapter, str]:
        """Take in the answer to an InspectAdapter.

        Returns:
            The record it is about, and why it cannot become what its name means (empty if it did).
        """
        pending = self._inspecting.get((event.name, event.path))
        if not pending:
            raise ValueError(f"nobody asked to inspect adapter {event.name!r} at {event.path}")
        record = pending.popleft()
        if not pending:
            del self._inspecting[event.name, event.path]
        error = event.error or self._check_size(event)
        if error:
            self.fail(record, error)
            return record, failure(record)
        record.state = AdapterState.READY
        record.content_hash = event.content_hash
        record.num_pages = event.num_pages
        record.num_bytes = event.num_bytes
        record.max_rank = event.max_rank
        record.modules = list(event.modules)
        self._by_hash.setdefault(record.content_hash, []).append(record)
        refusal = self._promote(record)
        self._forget_unused(record)
        return record, refusal

    def fail(self, record: Adapter, error: str) -> None:
        """Mark a record as unusable; a READY one gives up its hash."""
        if record.state is AdapterState.READY:
            self._drop_hash(record)
        record.state = AdapterState.FAILED
        record.error = error

    def _promote(self, record: Adapter) -> str:
        """Let an inspected record serve its name; returns why not, if it cannot."""
        if record.is_named:
            return ""
        if record.is_unloaded:
            return f"adapter {record.name!r} was unloaded while it was being read"
        current = self._by_name.get(record.name)
        if current is not None and current.generation > record.generation:
            return f"adapter {record.name!r} was replaced while it was being read"
        self._set_current(record)
        return ""

    def _check_size(self, event: AdapterInspected) -> str:
        if not event.content_hash or event.num_pages < 1:
            return "the worker sent neither an error nor a content hash and a size"
        if event.num_pages >= self._max_pages:
            return (
                f"it needs {event.num_pages} pages and a request at least one more, but the pool "
                f"has {self._max_pages}; enlarge the pool"
            )
        return ""

    def _create(self, name: str, path: str) -> Adapter:
        if not name or not path:
            raise RequestRefused("bad_request", "an adapter needs a name and a path")
        self._num_created += 1
        return Adapter(name=name, path=path, generation=self._num_created)

    def _set_current(self, record: Adapter) -> None:
        old = self._by_name.get(record.name)
        self._by_name[record.name] = record
        record.is_named = True
        if old is not None:
            record.service = old.service
            record.last_use = old.last_use
            self._retire(old, record)

    def _retire(self, record: Adapter, successor: Adapter | None) -> None:
        self._retired(record, successor)
        record.is_named = False
        self._forget_unused(record)

    def _inspect(self, record: Adapter) -> None:
        record.state = AdapterState.INSPECTING
        self._inspecting.setdefault((record.name, record.path), deque()).append(record)
        self._send(InspectAdapter(name=record.name, path=record.path))

    def _forget_unused(self, record: Adapter) -> None:
        unused = not record.is_named and not record.num_requests
        if unused and record.state is AdapterState.READY:
            self._drop_hash(record)

    def _drop_hash(self, record: Adapter) -> None:
        """Idempotent: a record may be unused more than once."""
        records = self._by_hash.get(record.content_hash, [])
        if record in records:
            records.remove(record)
            if not records:
                del self._by_hash[record.content_hash]
                self._orphan(record.content_hash)

    def _unknown(self, name: str) -> RequestRefused:
        more = ", ..." if len(self._by_name) > MAX_LISTED else ""
        listed = ", ".join(nsmallest(MAX_LISTED, self._by_name)) + more
        return RequestRefused(
            "unknown_adapter",
            f"no adapter is registered as {name!r}; known: {listed or 'none'}",
        )


def failure(record: Adapter) -> str:
    return f"adapter {record.name!r} at {record.path} cannot be served: {record.error}"
