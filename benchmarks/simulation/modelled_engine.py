"""One engine in virtual time: the real scheduler and page accounting over a modelled worker."""

from array import array
from collections.abc import Callable, Iterator

from msgspec.structs import replace

from loraplex.scheduler.frontend_protocol import Outputs, SequenceOutput
from loraplex.scheduler.request import Request
from loraplex.scheduler.scheduler import Scheduler
from loraplex.scheduler.worker_protocol import (
    AdapterInspected,
    AdapterLoaded,
    InspectAdapter,
    LoadAdapter,
    SamplingSpec,
    StepPlan,
    StepResult,
    UnloadAdapter,
    int_array,
)

from modelled_worker import CostModel, ModelledWorker

NO_SAMPLING = SamplingSpec(
    temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, seed=0, repetition_penalty=1.0,
    presence_penalty=0.0, frequency_penalty=0.0, max_tokens=1, min_tokens=0,
    stop_token_ids=int_array(), num_logprobs=-1, num_prompt_logprobs=-1,
    bias_token_ids=int_array(), bias_values=array("f"),
)  # fmt: skip

Event = StepResult | AdapterLoaded


class ModelledEngine:
    """Plans with a real scheduler; a cost model says when steps and loads end.

    Attributes:
        scheduler: the caller adds and aborts its requests and registers its adapters.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        cost: CostModel,
        adapter_pages: Callable[[int], int],
        clock: Callable[[], float],
        push: Callable[[float, Event], None],
    ) -> None:
        """`push` is called with the time of each event that is to come back to `take`.

        An adapter's path is its number; `adapter_pages` gives its pages.
        """
        self.scheduler = scheduler
        self._adapter_pages = adapter_pages
        self._clock = clock
        self._push = push
        self._worker = ModelledWorker(cost)

    def take(self, event: Event) -> Iterator[SequenceOutput]:
        """Take in an event whose time has come; yields the outputs of its sequences."""
        if isinstance(event, AdapterLoaded):
            self.scheduler.on_adapter_loaded(event)
            return
        yield from _sequences(self.scheduler.commit(event))

    def plan(
        self, on_step: Callable[[StepPlan, int], None] = lambda plan, num_adapters: None
    ) -> Iterator[SequenceOutput]:
        """Plan as many steps as may be in flight; yields requests that fail meanwhile.

        `on_step` is called with each plan and its number of distinct adapters.
        """
        while True:
            plan = self.scheduler.plan()
            num_inspected = self._run_commands()
            yield from _sequences(self.scheduler.outputs.take())
            if plan is None and not num_inspected:
                return
            if plan is not None:
                end_s, num_adapters = self._worker.step(plan, self._clock())
                self._push(end_s, StepResult(plan.step_id, int_array([0] * sum(plan.samples))))
                on_step(plan, num_adapters)

    def _run_commands(self) -> int:
        """Run the scheduler's commands; returns how many adapters were inspected, in no time."""
        num_inspected = 0
        for command in self.scheduler.take_commands():
            match command:
                case InspectAdapter():
                    num_inspected += 1
                    pages = self._adapter_pages(int(command.path))
                    self.scheduler.on_adapter_inspected(
                        AdapterInspected(
                            command.name, command.path, content_hash=command.path, num_pages=pages
                        )
                    )
                case LoadAdapter():
                    done = AdapterLoaded(command.adapter_slot, command.content_hash)
                    pages = self._adapter_pages(int(command.path))
                    self._push(self._worker.load(command, pages, self._clock()), done)
                case UnloadAdapter():
                    pass
        return num_inspected


def make_request(
    request_id: int,
    *,
    num_prompt_tokens: int,
    num_new_tokens: int,
    adapter: int | None = None,
    salt: str = "",
    priority: int = 0,
) -> Request:
    """Make a request of these lengths. The first token of its prompt is its id."""
    prompt = array("i", bytes(4 * num_prompt_tokens))
    prompt[0] = request_id
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling=replace(NO_SAMPLING, max_tokens=num_new_tokens),
        adapter="" if adapter is None else str(adapter),
        salt=salt,
        priority=priority,
    )


def _sequences(outputs: Outputs) -> Iterator[SequenceOutput]:
    for _, of_frontend in outputs:
        yield from of_frontend
