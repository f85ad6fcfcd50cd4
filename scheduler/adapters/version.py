"""One version of a named adapter: its folder, what its files hold, and who waits for it."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum

from loraplex.scheduler.adapters.usage import Usage
from loraplex.scheduler.frontend_protocol import AdapterSource


class AdapterState(Enum):
    REGISTERED = "registered"  # the path is known, nothing was read yet
    INSPECTING = "inspecting"
    READY = "ready"  # content hash and size are known
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class AdapterVersion:
    """One version of a named adapter."""

    name: str
    source: AdapterSource
    generation: int
    owner: str = ""  # the tenant that registered the name; empty: the operator
    state: AdapterState = AdapterState.REGISTERED
    is_named: bool = False  # new requests for `name` get this version
    error: str = ""
    content_hash: str = ""
    num_pages: int = 0
    num_bytes: int = 0
    max_rank: int = 0
    modules: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # parts of its folder that are not used
    num_requests: int = 0  # unfinished ones
    reply_keys: list[Hashable] = field(default_factory=list)  # of those who wait for the inspection
    pin_keys: list[Hashable] = field(default_factory=list)  # of those who wait for it to be pinned
    wants_pin: bool = False  # to be pinned once it is inspected
    is_pinned: bool = False
    last_use: float = -1.0  # seconds: when a request came or ended last; negative: never
    usage: Usage | None = None  # counts of the name, shared by its versions

    @property
    def path(self) -> str:
        """The folder that the workers read."""
        return self.source.path

    def is_at(self, source: AdapterSource) -> bool:
        """Tell whether both name one folder, or one link, which may lead to another folder now."""
        return source.named == self.source.named or source.path == self.path


def failure(version: AdapterVersion, why: str = "") -> str:
    """Return the error text of a version that is FAILED or whose last read has failed.

    `why` is what else keeps it from being served at present.
    """
    text = f"adapter {version.name!r} at {version.path} cannot be served"
    if why:
        return f"{text} now: {why}"
    if version.state is AdapterState.FAILED:
        return f"{text}: {version.error}"
    return f"{text} now: {version.error}; the next request tries again"
