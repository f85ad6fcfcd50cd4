"""The interface of a scheduling policy, which orders the waiting requests.

A policy sorts requests into flows. Within a flow the order is fixed at arrival (`Request.key`).
Between flows the policy decides on each walk, by the waiting requests and the context, so nothing
is sorted again.

A request is admitted when it starts, or when its adapter is loaded for it. From then on its `rank`
holds until it ends. The running request of the highest rank is preempted first, and starts again
before all that were never admitted. So a policy cannot make two requests preempt each other in
turns.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from loraplex.scheduler.request import Rank, Request
from loraplex.scheduler.step_builder import StepBuilder

ADMITTED: Final = ("admitted",)
"""The flow of admitted requests that wait again, in policies with `admitted_first`."""


class WaitingView(Protocol):
    """The requests that may start. It does not change during a walk."""

    @property
    def by_age(self) -> Sequence[Request]:
        """All requests, in order of arrival."""

    @property
    def flows(self) -> Mapping[Hashable, Sequence[Request]]:
        """The requests by flow, each in order of `key` (ADMITTED: of `rank`). No flow is empty."""


@dataclass(slots=True)
class Context:
    """Further inputs of a policy. `num_free` counts down while a walk admits requests."""

    now: float  # seconds
    num_free: int  # free slots, less those of requests that wait for their adapter
    lacked_room: bool  # the last walk ended because pages were short
    resident: Callable[[], Iterable[str]]  # content hashes of the adapters in pages


class PolicyHooks:
    """Events that a policy may count."""

    def on_arrival(self, request: Request, now: float) -> None:
        """The request was accepted."""

    def on_flow(self, request: Request) -> None:
        """The request is the first of a flow that was empty."""

    def on_admitted(self, request: Request, now: float) -> None:
        """The request was admitted for the first time."""

    def on_result(self, step: StepBuilder, now: float) -> None:
        """The step's tokens are about to be handed to its requests."""

    def on_end(self, request: Request) -> None:
        """The request ended, in whatever state."""

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Raise IntegrityError unless the hooks' counts are those of the unfinished `requests`."""


class Policy(PolicyHooks, ABC):
    """Answers depend on view, context and the counts that the hooks keep alone."""

    admitted_first = True  # whether admitted requests that wait again go before all others

    @abstractmethod
    def flow(self, request: Request) -> Hashable:
        """Return the flow of a request that may start."""

    @abstractmethod
    def order(self, view: WaitingView, context: Context) -> Iterator[Request]:
        """Yield requests in the order in which to try them, each at most once."""

    def key(self, request: Request) -> Rank:
        """Return the place within its flow, fixed at arrival."""
        return (0.0, request.order)

    def rank(self, request: Request, now: float) -> Rank:
        """Return the place among admitted requests; called on every attempt to start it."""
        return request.rank if request.admitted_at >= 0 else (now, request.order)

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Take the weights of tenants. The other tenants have those of the configuration."""

    def requests_to_drop(self, view: WaitingView, context: Context) -> Sequence[Request]:
        """Return the requests to fail now; called once a plan."""
        return ()


def aged_prefix(by_age: Sequence[Request], *, now: float, max_wait_s: float) -> Iterator[Request]:
    """Yield the requests that have waited `max_wait_s`, oldest first."""
    for request in by_age:
        if now - request.arrival < max_wait_s:
            return
        yield request
