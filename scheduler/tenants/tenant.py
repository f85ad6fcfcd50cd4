"""A tenant as the operator has described it: its weight and its limits."""

from loraplex.scheduler.worker_protocol import Record


class Tenant(Record):
    """One tenant. None is: not limited, or for `weight` what the configuration says."""

    name: str
    weight: float | None = None  # share of the work under vtc
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts and answers together
    max_running_requests: int | None = None  # accepted and not finished; each answer counts

    @property
    def is_limited(self) -> bool:
        """Tells whether any limit is set."""
        limits = (self.requests_per_minute, self.tokens_per_minute, self.max_running_requests)
        return any(limit is not None for limit in limits)
