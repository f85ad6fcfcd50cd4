"""Usage counts of the base model and of each adapter, updated once or twice a request."""

from collections.abc import Iterable, Sequence

from loraplex.scheduler.adapters.binding import not_ready
from loraplex.scheduler.adapters.usage import FIRST_TTFT_US, NUM_TTFT_BUCKETS, TIERS, Usage
from loraplex.scheduler.adapters.version import AdapterVersion
from loraplex.scheduler.request import Request, RequestState
from loraplex.scheduler.statistics.bucket_counts import BucketCounts
from loraplex.scheduler.step_builder import StepBuilder
from loraplex.scheduler.worker_protocol import AdapterLoaded

LOAD_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Bounds of the histograms of load times."""


class UsageStats:
    """Keeps Usage of the base model, of each adapter, and of all adapters together.

    A request's tier says where its adapters were when the request needed them: "disk" if files had
    to be read, "host" if the host store had what was missing, "pages" if all were resident. A
    request of several adapters counts for each of them, and once among all.

    Attributes:
        load_seconds: times of loads into pages, by the tier that the adapter came from.
    """

    def __init__(self) -> None:
        self.base = Usage()
        self.adapters = Usage()
        self.load_seconds = {tier: BucketCounts(LOAD_SECONDS) for tier in TIERS[1:]}

    def _of(self, request: Request) -> list[Usage]:
        if not request.bindings:
            return [self.base]
        return [*(_usage(binding.version) for binding in request.bindings), self.adapters]

    def on_accepted(self, request: Request) -> None:
        if not_ready(request.bindings):
            request.tier = "disk"
        for usage in self._of(request):
            usage.num_requests += 1

    def on_loaded(
        self, event: AdapterLoaded, version: AdapterVersion, waited: Iterable[Request]
    ) -> None:
        """Count a load; `version` gave its path, `waited` are the requests that were parked."""
        for usage in (_usage(version), self.adapters):
            usage.add_load(event)
        tier = "host" if event.from_host else "disk"
        if not event.error:
            self.load_seconds[tier].observe(event.load_us / 1e6)
        for request in waited:
            request.tier = "disk" if request.tier == "disk" else tier

    def on_result(self, step: StepBuilder, now: float) -> None:
        """Count first tokens; call it before the step's tokens are appended."""
        for row in [i for i, request in enumerate(step.requests) if request.first_token_at < 0]:
            request = step.requests[row]
            if step.samples[row] and request.state is not RequestState.FINISHED:
                request.first_token_at = now
                ttft_us = int((now - request.arrival) * 1e6)
                tier = TIERS.index(request.tier or "pages")
                for usage in self._of(request):
                    usage.add_first_token(request.num_prompt_tokens, ttft_us, tier)

    def on_end(self, request: Request) -> None:
        num_known = request.num_prompt_tokens + len(request.generated_token_ids)
        num_generated = len(request.token_ids) - num_known
        for usage in self._of(request):
            usage.num_ended += 1
            usage.num_generated_tokens += num_generated


def first_tokens_by_us(usages: Sequence[Usage]) -> dict[str, int]:
    """Returns first tokens by their time: the number in each bucket, by the upper bound in us."""
    bounds = [str(FIRST_TTFT_US << bucket) for bucket in range(NUM_TTFT_BUCKETS - 1)]
    counts = [usage.ttft_counts for usage in usages if usage.ttft_counts is not None]
    totals = [sum(column) for column in zip(*counts, strict=True)] or [0] * NUM_TTFT_BUCKETS
    return dict(zip((*bounds, "+Inf"), totals, strict=True))


def _usage(version: AdapterVersion) -> Usage:
    if version.usage is None:
        version.usage = Usage()
    return version.usage
