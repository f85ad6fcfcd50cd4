"""A policy with its waiting queue, without a scheduler around it."""

from array import array
from typing import Any

from loraplex.scheduler.adapters.binding import Binding
from loraplex.scheduler.adapters.version import AdapterVersion
from loraplex.scheduler.config import SchedulerConfig
from loraplex.scheduler.policies.policy import Context, Policy
from loraplex.scheduler.policies.registry import make_policy
from loraplex.scheduler.request import Request, RequestState
from loraplex.scheduler.step_builder import StepBuilder
from loraplex.scheduler.waiting_queue import WaitingQueue

from helpers.fakes.fake_model import sampling_spec


class PolicyQueue:
    """A policy and its waiting queue; `admit` takes requests as a scheduler with seats would."""

    def __init__(self, name: str, **options: Any) -> None:
        config = SchedulerConfig(policy=name, **options)
        self.policy: Policy = make_policy(config)
        self.waiting = WaitingQueue(self.policy)
        self.resident: set[str] = set()
        self.requests: dict[str, Request] = {}
        self.num_added = 0

    def add(
        self,
        name: str,
        *,
        at: float = 0.0,
        adapter: str = "",
        tenant: str = "",
        client: bytes = b"",
        priority: int = 0,
        num_prompt_tokens: int = 1,
    ) -> Request:
        request = Request(
            request_id=name,
            prompt_token_ids=array("i", [0] * num_prompt_tokens),
            sampling=sampling_spec(),
            adapter=adapter,
            salt=tenant,
            client=client,
            priority=priority,
        )
        self.num_added += 1
        request.order = self.num_added
        request.arrival = at
        if adapter:
            request.bindings = [
                Binding(AdapterVersion(name, f"/{name}", 1, content_hash=name))
                for name in adapter.split("+")
            ]
        request.key = request.rank = self.policy.key(request)
        self.requests[name] = request
        self.policy.on_arrival(request, at)
        self.waiting.push(request)
        self.check()
        return request

    def context(self, now: float = 0.0, num_free: int = 100, lacked_room: bool = False) -> Context:
        return Context(now, num_free, lacked_room, lambda: sorted(self.resident))

    def names_in_order(self, now: float = 0.0, num_free: int = 100) -> str:
        """Returns all names in the order in which the policy tries them; changes nothing."""
        order = self.policy.order(self.waiting, self.context(now, num_free))
        return " ".join(str(request.request_id) for request in order)

    def admit(self, num: int, now: float = 0.0, num_free: int = 100) -> str:
        """Admits the first `num`, which leave the queue; returns their names."""
        context, taken = self.context(now, num_free), []
        for request in self.policy.order(self.waiting, context):
            request.rank = self.policy.rank(request, now)
            context.num_free -= 1
            if request.admitted_at < 0:
                request.admitted_at = now
                self.policy.on_admitted(request, now)
            taken.append(request)
            if len(taken) == num:
                break
        self.waiting.discard(taken)
        self.check()
        return " ".join(str(request.request_id) for request in taken)

    def preempt(self, name: str) -> None:
        self.waiting.push(self.requests[name])
        self.check()

    def end(self, name: str) -> None:
        request = self.requests.pop(name)
        if request in self.waiting.by_age:
            self.waiting.remove(request)
        request.state = RequestState.FINISHED
        self.policy.on_end(request)
        self.check()

    def decode(self, *names: str) -> None:
        """Reports one generated token of each request."""
        step = StepBuilder(0, 1000)
        step.add_decodes([self.requests[name] for name in names], [1] * len(names))
        self.policy.on_result(step, 0.0)

    def check(self) -> None:
        self.waiting.check_integrity()
        self.policy.check_integrity(self.requests.values())
