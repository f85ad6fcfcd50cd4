"""Early abort (S-LoRA, arXiv 2311.03285, section 4.3 and appendix B).

When more requests come than can have their first token in time, serving all in order makes all of
them late. Dropping the oldest early leaves the newest, which can still be in time. They are served
in order of arrival.
"""

import math
from bisect import bisect_left
from collections.abc import Hashable, Iterator, Sequence
from operator import attrgetter

from loraplex.scheduler.policies.policy import ADMITTED, Context, Policy, WaitingView
from loraplex.scheduler.request import Request, RequestState
from loraplex.scheduler.step_builder import StepBuilder

_MAX_SAMPLES = 256  # waiting requests that one plan looks at


def num_to_drop(
    requests: Sequence[Request], *, first_token_at: float, slo_s: float, rate: float, num_free: int
) -> int:
    """Return the least d such that all others start in time without the d oldest.

    Served in order, the k-th of the rest (from 1) starts max(0, k - num_free) / rate seconds from
    now. The function looks at no more than _MAX_SAMPLES requests, evenly spread. With n requests
    the answer may be too small by n / _MAX_SAMPLES; the next plan drops those.

    Args:
        requests: in order of arrival.
        first_token_at: time of the first token of a request that starts now, in seconds.
        slo_s: seconds from arrival within which the first token should come.
        rate: starts a second while requests wait; inf if unknown.
        num_free: requests that can start at once.
    """
    expired = bisect_left(requests, first_token_at - slo_s, key=attrgetter("arrival"))
    if math.isinf(rate):
        return expired
    stride = len(requests) // _MAX_SAMPLES + 1
    most = float(expired)
    for index in range(len(requests) - 1, expired - 1, -stride):
        slack = requests[index].arrival + slo_s - first_token_at
        most = max(most, index + 1 - num_free - rate * slack)
    return min(math.ceil(most - 1e-9), len(requests))  # slack is a difference of rounded times


class ServiceRate:
    """Measures starts a second while requests wait, over about the last `window_s` seconds."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._starts = 0.0
        self._seconds = 0.0

    def observe(self, num_starts: int, seconds: float, *, waited: bool) -> None:
        """Add a span of time; `waited` tells whether requests waited throughout."""
        fade = math.exp(-seconds / self._window_s)
        self._starts = self._starts * fade + num_starts * waited
        self._seconds = self._seconds * fade + seconds * waited

    @property
    def value(self) -> float:
        """Starts a second; inf (unknown) unless requests waited for a quarter of the window.

        So an estimate that lets no request wait is forgotten, and measured again.
        """
        if self._seconds < self._window_s / 4:
            return math.inf
        return self._starts / self._seconds


class LatencyEstimate:
    """Estimates mean plus twice the mean deviation, as TCP's retransmission timer (RFC 6298)."""

    def __init__(self) -> None:
        self._mean = 0.0
        self._deviation = 0.0

    def observe(self, seconds: float) -> None:
        if not self._mean:
            self._mean, self._deviation = seconds, seconds / 4
            return
        error = seconds - self._mean
        self._mean += error / 8
        self._deviation += (abs(error) - self._deviation) / 4

    @property
    def value(self) -> float:
        return self._mean + 2 * self._deviation


class EarlyAbort(Policy):
    """Serves first come, first served, and drops requests that would miss their first token's
    objective.

    Bound: nothing that arrived later is admitted before a request. The first plan after
    `ttft_slo_s` finds the request admitted or drops it. Priorities are ignored: a request of high
    priority needs an objective of its own.
    """

    def __init__(self, *, ttft_slo_s: float) -> None:
        self._slo_s = ttft_slo_s
        self._rate = ServiceRate(ttft_slo_s)
        self._first_token = LatencyEstimate()
        self._num_admitted = 0
        self._last_plan: float | None = None

    def flow(self, request: Request) -> Hashable:
        return None

    def order(self, view: WaitingView, context: Context) -> Iterator[Request]:
        yield from view.flows.get(ADMITTED, ())
        yield from view.flows.get(None, ())

    def requests_to_drop(self, view: WaitingView, context: Context) -> Sequence[Request]:
        requests = view.flows.get(None, ())
        if self._last_plan is not None:
            waited = bool(requests) and requests[0].arrival <= self._last_plan
            self._rate.observe(self._num_admitted, context.now - self._last_plan, waited=waited)
        self._num_admitted = 0
        self._last_plan = context.now
        if not requests:
            return ()
        # A wait of up to half the objective is always allowed: a bad estimate must meet the truth.
        num = num_to_drop(
            requests,
            first_token_at=context.now + min(self._first_token.value, self._slo_s / 2),
            slo_s=self._slo_s,
            rate=self._rate.value,
            num_free=0 if context.lacked_room else context.num_free,
        )
        return requests[:num]

    def on_admitted(self, request: Request, now: float) -> None:
        self._num_admitted += 1

    def on_result(self, step: StepBuilder, now: float) -> None:
        for request, samples in zip(step.requests, step.samples, strict=True):
            is_first = samples and len(request.token_ids) == len(request.prompt_token_ids)
            if is_first and request.state is not RequestState.FINISHED:
                self._first_token.observe(now - request.admitted_at)
