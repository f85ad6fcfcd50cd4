"""The report of its load that an engine pushes to a router."""

from loraplex.scheduler.worker_protocol import Message


class EngineReport(Message):
    """Load of one engine now, and the adapters that changed since its last report.

    The first report names all adapters that the engine holds or loads.
    """

    num_received: int  # requests that came from this router since its first report
    running: int
    waiting: int
    max_running: int
    waiting_tokens: int  # prompt tokens that are not computed yet
    free_pages: int  # free, or evictable
    num_pages: int
    prefill_tokens_per_second: float  # 0: not known yet
    steps_per_second: float
    cold_load_seconds: float  # until an adapter that is not on the device can be used
    adapters: dict[str, float] = {}  # content hash -> seconds until it can be used, where changed
    dropped_adapters: list[str] = []  # content hashes that the engine no longer holds
