"""One version of a named adapter: its folder, what its files hold, and who waits for it."""

from array import array
from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum

from loraplex.scheduler.adapters.usage import Usage
from loraplex.scheduler.frontend_protocol import AdapterSource, AdapterVocabulary


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
    kind: str = ""  # see AdapterInspected
    max_rank: int = 0
    modules: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # parts of its folder that are not used
    invocation_tokens: "array[int]" = field(default_factory=lambda: array("i"))
    """It applies from where they begin last in a prompt; empty: to all tokens."""
    num_tokens: int = 0  # the size of its vocabulary; 0: the base model's
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

    @property
    def vocabulary(self) -> AdapterVocabulary:
        """The tokens of its requests. An adapter that changes no token's row has the base's."""
        if "+tokens" not in self.kind:
            return AdapterVocabulary()
        folder = "" if self.source.is_memory else self.path
        key = f"{self.content_hash} {self.source.stamp} {folder}"
        return AdapterVocabulary(key, folder, self.num_tokens)

    def is_open_to(self, tenant: str) -> bool:
        """Tell whether the tenant may see where the files are and what is wrong with them."""
        return tenant in ("", self.owner)

    def is_at(self, source: AdapterSource) -> bool:
        """Tell whether both name one folder, or one link, which may lead to another folder now."""
        return source.named == self.source.named or source.path == self.path


def failure(version: AdapterVersion, *, why: str = "", tenant: str = "") -> str:
    """Return the error text of a version that is FAILED or whose last read has failed.

    Args:
        why: what else keeps it from being served at present. It names no path.
        tenant: who reads the text. A tenant other than the owner sees neither the path nor errors
            of its files.
    """
    if version.is_open_to(tenant):
        place = "" if version.source.is_memory else f" at {version.path}"
        head, error = f"adapter {version.name!r}{place} cannot be served", version.error
    else:
        head = f"adapter {version.name!r} cannot be served"
        error = "its owner and the operator see the reason in the list of adapters"
    if why:
        return f"{head} now: {why}"
    if version.state is AdapterState.FAILED:
        return f"{head}: {error}"
    return f"{head} now: {error}; the next request tries again"
