"""Early abort (S-LoRA, arXiv 2311.03285, section 4.3 and appendix B).

When more requests come than can have their first token in time, serving all in order makes all of
them late. Giving up the oldest early leaves the newest, which can still be in time; those are
served in order of arrival.
"""

import math
from bisect import bisect_left
from collections.abc import Hashable, Iterator, Sequence
from operator import attrgetter

from loraplex.scheduler.policies.policy import CHOSEN, Context, Policy, WaitingView
from loraplex.scheduler.request import Request, RequestState
from loraplex.scheduler.step_builder import StepBuilder

_MAX_SAMPLES = 256  # waiting requests that one plan looks at


def num_hopeless(
    requests: Sequence[Request], *, first_token_at: float, slo_s: float, rate: float, num_free: int
) -> int:
    """The least d such that without the d oldest all others start in time.

    Served in order, the k-th of the rest (from 1) starts max(0, k - num_free) / rate seconds from
    now. At most _MAX_SAMPLES of the requests are looked at, evenly spread, so that with n of them
    the answer may be short by n / _MAX_SAMPLES; the next plan finds those.

    Args:
        requests: in order of arrival.
        first_token_at: when a request that started now would have its first token, in seconds.
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
    """Starts a second while requests wait, over about the last `window_s` seconds."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._starts = 0.0
        self._seconds = 0.0

    def observe(self, num_starts: int, seconds: float, *, waited: bool) -> None:
        """Take in a stretch of time, and whether requests waited throughout."""
        fade = math.exp(-seconds / self._window_s)
        self._starts = self._starts * fade + num_starts * waited
        self._seconds = self._seconds * fade + seconds * waited

    @property
    def value(self) -> float:
        """inf (unknown) unless requests waited for a quarter of the window; so an estimate that
        lets nobody wait is forgotten, and measured again."""
        if self._seconds < self._window_s / 4:
            return math.inf
        return self._starts / self._seconds


class LatencyEstimate:
    """Mean plus twice the mean deviation, smoothed like TCP's retransmission timer (RFC 6298)."""

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
    """First come, first served, without those that cannot have their first token in time.

    Bound: nothing that arrived later is chosen before a request, and after at most `ttft_slo_s`
    the request has been chosen or is given up (once a plan is made again). Priorities count
    nothing: a request of high priority deserves an objective of its own.
    """

    def __init__(self, *, ttft_slo_s: float) -> None:
        self._slo_s = ttft_slo_s
        self._rate = ServiceRate(ttft_slo_s)
        self._first_token = LatencyEstimate()
        self._num_chosen = 0
        self._last_plan: float | None = None

    def flow(self, request: Request) -> Hashable:
        return None

    def order(self, view: WaitingView, context: Context) -> Iterator[Request]:
        yield from view.flows.get(CHOSEN, ())
        yield from view.flows.get(None, ())

    def hopeless(self, view: WaitingView, context: Context) -> Sequence[Request]:
        requests = view.flows.get(None, ())
        if self._last_plan is not None:
            waited = bool(requests) and requests[0].arrival <= self._last_plan
            self._rate.observe(self._num_chosen, context.now - self._last_plan, waited=waited)
        self._num_chosen = 0
        self._last_plan = context.now
        if not requests:
            return ()
        # A wait of up to half the objective is always allowed: a bad estimate must meet the truth.
        num = num_hopeless(
            requests,
            first_token_at=context.now + min(self._first_token.value, self._slo_s / 2),
            slo_s=self._slo_s,
            rate=self._rate.value,
            num_free=0 if context.lacked_room else context.num_free,
        )
        return requests[:num]

    def on_chosen(self, request: Request, now: float) -> None:
        self._num_chosen += 1

    def on_result(self, step: StepBuilder, now: float) -> None:
        for request, samples in zip(step.requests, step.samples, strict=True):
            is_first = samples and len(request.token_ids) == len(request.prompt_token_ids)
            if is_first and request.state is not RequestState.FINISHED:
                self._first_token.observe(now - request.chosen_at)
