"""In which order waiting requests start: what every policy answers, and the two simplest ones.

A policy sorts requests into flows. Within a flow the order is fixed at arrival (`Request.key`);
between flows the policy decides on each walk, by the waiting requests and the context, so nothing
is sorted anew. The other policies are in policy_cluster.py, policy_abort.py and policy_vtc.py.

Once a request is chosen (started, or its adapter loaded for it) its `rank` holds until it ends: the
running request of the highest rank is preempted first, and goes before all that were never chosen.
No change of mind of the policy can therefore make two requests push each other out in turns.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from loraplex.scheduler.request import Rank, Request
from loraplex.scheduler.step_builder import StepBuilder

CHOSEN: Final = ("chosen",)
"""The flow of requests that were chosen and wait again, of policies with `chosen_first`."""


class WaitingView(Protocol):
    """The requests that may start; nothing is added or removed during a walk."""

    @property
    def by_age(self) -> Sequence[Request]:
        """All, in order of arrival."""

    @property
    def flows(self) -> Mapping[Hashable, Sequence[Request]]:
        """The same by flow, each in order of `key` (CHOSEN: of `rank`); none is empty."""


@dataclass(slots=True)
class Context:
    """What else a policy may look at. `num_free` counts down while a walk chooses requests."""

    now: float  # seconds
    num_free: int  # seats for further requests: free ones, less those that are spoken for
    lacked_room: bool  # the last walk ended because pages were short
    resident: Callable[[], Iterable[str]]  # content hashes of the adapters in pages


class PolicyHooks:
    """What a policy hears of, to keep its counts; most need nothing of it."""

    def on_arrival(self, request: Request, now: float) -> None:
        """The request was accepted."""

    def on_flow(self, request: Request) -> None:
        """The request is the first of a flow that was empty."""

    def on_chosen(self, request: Request, now: float) -> None:
        """The request starts, or its adapter is loaded for it, for the first time."""

    def on_result(self, step: StepBuilder, now: float) -> None:
        """The step's tokens are about to be handed to its requests."""

    def on_end(self, request: Request) -> None:
        """The request ended, in whatever state."""

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Raise IntegrityError unless the hooks' counts are those of the unfinished `requests`."""


class Policy(PolicyHooks, ABC):
    """Answers are pure functions of view, context and the counts that the hooks keep."""

    chosen_first = True  # whether requests that were chosen and wait again go before all others

    @abstractmethod
    def flow(self, request: Request) -> Hashable:
        """Which flow a request belongs to; called when it is READY to start."""

    @abstractmethod
    def order(self, view: WaitingView, context: Context) -> Iterator[Request]:
        """Requests in the order in which to try them, each at most once."""

    def key(self, request: Request) -> Rank:
        """Place within its flow, fixed at arrival."""
        return (0.0, request.order)

    def rank(self, request: Request, now: float) -> Rank:
        """Place among the chosen ones; asked for on every attempt to start the request."""
        return request.rank if request.chosen_at >= 0 else (now, request.order)

    def hopeless(self, view: WaitingView, context: Context) -> Sequence[Request]:
        """Requests to give up now; asked for once a plan."""
        return ()


def aged_prefix(by_age: Sequence[Request], *, now: float, max_wait_s: float) -> Iterator[Request]:
    """Those that have waited `max_wait_s`, oldest first."""
    for request in by_age:
        if now - request.arrival < max_wait_s:
            return
        yield request
