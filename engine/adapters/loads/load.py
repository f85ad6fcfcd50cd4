"""A load of an adapter into its pages."""

import time
from dataclasses import dataclass, field

from loraplex.memory.device.page_copier import Event
from loraplex.memory.host.store import PackedAdapter
from loraplex.scheduler.worker_protocol import LoadAdapter


@dataclass(slots=True, eq=False)
class Load:
    """A LoadAdapter that has not been answered; only the loader's threads change it until then."""

    command: LoadAdapter
    wait_for: Event  # the last step that used the pages or the slot for what they held before
    started_at: float = field(default_factory=time.perf_counter)
    adapter: PackedAdapter | None = None  # in use in the host store until the copy has ended
    from_host: bool = False
    copied: Event | None = None  # the end of the copy; None: not enqueued
    turn: int = -1  # among the loads that all ranks finish together; -1: this rank does it alone
    error: str = ""
    is_transient: bool = False  # of the error: reading it later may work
