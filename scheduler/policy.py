"""In which order requests are served: pure functions, chosen by name.

A policy maps a request to a sort key, smaller first; keys are unique and fixed while the request
lives. The same order says who starts next and, backwards, who is preempted first.
"""

from collections.abc import Callable

from loraplex.scheduler.request import Request

Policy = Callable[[Request], tuple[int, ...]]


def fcfs(request: Request) -> tuple[int, ...]:
    """First come, first served, among requests of the same priority; lower priority is earlier."""
    return (request.priority, request.order)


POLICIES: dict[str, Policy] = {"fcfs": fcfs}


def get_policy(name: str) -> Policy:
    """Raises ValueError, listing the policies there are, for an unknown name."""
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; there are {sorted(POLICIES)}")
    return POLICIES[name]
