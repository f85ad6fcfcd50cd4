"""Runs a scheduler against the fake worker and compares every result with the oracle."""

from array import array
from collections import deque
from itertools import chain
from typing import Any

from loraplex.memory.config import MemoryConfig
from loraplex.scheduler.config import SchedulerConfig
from loraplex.scheduler.frontend_protocol import AdapterSource, MixPart, Outputs, SequenceOutput
from loraplex.scheduler.request import Request, RequestRefused
from loraplex.scheduler.scheduler import Scheduler
from loraplex.scheduler.worker_protocol import (
    AdapterEvicted,
    AdapterLoaded,
    DropAdapter,
    InspectAdapter,
    LoadAdapter,
    StepPlan,
    StepResult,
    UnloadAdapter,
)

from helpers.fakes.fake_model import Weights, oracle, sampling_spec
from helpers.fakes.fake_worker import FakeAdapter, FakeWorker
from helpers.scheduling.expectation import Expectation


class Harness:
    """One scheduler, one fake worker, a clock that only moves when told.

    Results and adapter events are held back until asked for, so tests choose their order. `check`
    runs the integrity check after each operation; `policy` gives options of SchedulerConfig.
    """

    def __init__(
        self,
        *,
        num_pages: int = 64,
        block_tokens: int = 4,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        max_steps_in_flight: int = 1,
        max_adapter_slots: int = 4,
        max_model_len: int = 64,
        max_queue_len: int = 1000,
        enable_prefix_caching: bool = True,
        check: bool = True,
        policy: dict[str, Any] | None = None,
    ) -> None:
        self.now = 0.0
        self.check = check
        self.max_model_len = max_model_len
        self.scheduler = Scheduler(
            config=SchedulerConfig(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_queue_len=max_queue_len,
                max_steps_in_flight=max_steps_in_flight,
                **(policy or {}),
            ),
            memory=MemoryConfig(
                block_tokens=block_tokens,
                max_adapter_slots=max_adapter_slots,
                enable_prefix_caching=enable_prefix_caching,
            ),
            num_pages=num_pages,
            max_model_len=max_model_len,
            base_fingerprint="base",
            clock=lambda: self.now,
        )
        self.files: dict[str, FakeAdapter] = {}
        self.worker = FakeWorker(
            num_pages=num_pages,
            block_tokens=block_tokens,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_adapter_slots=max_adapter_slots,
            files=self.files,
        )
        self.plans: list[StepPlan] = []
        self.results: deque[StepResult] = deque()
        self.events: deque[InspectAdapter | Any] = deque()
        self.expected: dict[Any, Expectation] = {}
        self.adapter_updates: dict[Any, Any] = {}
        self.requests: dict[Any, Request] = {}  # all that were accepted by add()
        self._names: list[str] = []  # of requests that a test names by a string

    # Actions of a client

    def add(
        self,
        request_id: Any,
        prompt: list[int],
        *,
        adapter: str = "",
        mix: dict[str, float] | None = None,
        salt: str = "",
        priority: int = 0,
        use_prefix_cache: bool = True,
        tenant: str = "",
        client: bytes = b"",
        num_resumed: int = 0,
        answer: tuple[int, int] = (0, 1),
        **sampling: Any,
    ) -> None:
        """Args:
        mix: weights by adapter, in place of `adapter`.
        num_resumed: tokens that another engine has generated, if the answer is longer.
        answer: index and number of the answers to the client's request.
        """
        spec = sampling_spec(**sampling)
        paths = {info["name"]: info["path"] for info in self.listed().values()}
        parts = [MixPart(name, weight) for name, weight in (mix or {}).items()]
        expectation = Expectation(prompt, spec, paths.get(adapter, ""))
        expectation.mix = [(paths.get(part.adapter, ""), part.weight) for part in parts]
        if num_resumed:
            token_ids, _, _ = self.oracle(expectation)
            expectation.token_ids = token_ids[: min(num_resumed, len(token_ids) - 1)]
            if expectation.token_ids:
                expectation.num_logprobs = len(expectation.token_ids)
                expectation.num_prompt_logprobs = len(prompt) - 1
        request = Request(
            request_id=self.number_of(request_id),
            prompt_token_ids=array("i", prompt),
            sampling=spec,
            adapter=adapter or "+".join(mix or {}),
            mix=parts,
            salt=salt,
            priority=priority,
            use_prefix_cache=use_prefix_cache,
            tenant=tenant,
            client=client,
            generated_token_ids=array("i", expectation.token_ids),
            index=answer[0],
            num_answers=answer[1],
        )
        try:
            self.scheduler.add(request)
        finally:
            self.verify()
        self.requests[request_id] = request
        self.expected[request_id] = expectation

    def number_of(self, name: Any) -> int:
        """The id of a request for the scheduler; a string gets a negative one."""
        if isinstance(name, int):
            return name
        if name not in self._names:
            self._names.append(name)
        return -1 - self._names.index(name)

    def name_of(self, request_id: int) -> Any:
        """Returns the test's name for the request."""
        return request_id if request_id >= 0 else self._names[-1 - request_id]

    def try_add(self, request_id: Any, prompt: list[int], **options: Any) -> str:
        """Add; returns the code if it was refused."""
        try:
            self.add(request_id, prompt, **options)
        except RequestRefused as refusal:
            return refusal.code
        return ""

    def abort(self, request_id: Any) -> bool:
        alive = self.scheduler.abort(self.number_of(request_id))
        if alive:
            self.expected[request_id].aborted = True
        self.verify()
        return alive

    def file(self, path: str, content: str, *values: Any, **named: Any) -> None:
        """Further arguments are those of FakeAdapter."""
        self.files[path] = FakeAdapter(content, *values, **named)

    def fail_for_now(self, path: str, error: str) -> None:
        """Let reads of a path fail for a passing reason; file() ends it."""
        self.files[path] = FakeAdapter("", 1, error, is_transient=True)

    def register(self, name: str, content: str = "", *values: Any, **named: Any) -> None:
        """A new path with this content, registered as `name`; as by file()."""
        path = f"/{name}/{len(self.files)}"
        self.file(path, content or name, *values, **named)
        self.scheduler.register_adapter(name, AdapterSource.at(path))
        self.verify()

    # Actions of an engine

    def plan(self) -> StepPlan | None:
        """Plan one step and have the worker execute it; its result waits in `results`."""
        plan = self.scheduler.plan()
        self.send_commands()
        self.take_updates()
        self.verify()
        if plan is not None:
            self.plans.append(plan)
            self.results.append(self.worker.step(plan))
        return plan

    def send_commands(self) -> None:
        """The worker does all at once; what it answers waits in `events`."""
        for command in self.scheduler.take_commands():
            if isinstance(command, InspectAdapter):
                self.events.append(self.worker.inspect(command))
            elif isinstance(command, LoadAdapter):
                self.events.append(self.worker.load(command))
            elif isinstance(command, DropAdapter):
                self.worker.drop(command)
            else:
                assert isinstance(command, UnloadAdapter)
                self.worker.unload(command)
            self.events.extend(self.worker.take_evicted())

    def deliver_event(self) -> None:
        event = self.events.popleft()
        if isinstance(event, AdapterLoaded):
            self.scheduler.on_adapter_loaded(event)
        elif isinstance(event, AdapterEvicted):
            self.scheduler.adapters.on_evicted(event.content_hash)
        else:
            self.scheduler.on_adapter_inspected(event)
        self.take_updates()
        self.verify()

    def commit(self) -> list[SequenceOutput]:
        outputs = sequences(self.scheduler.commit(self.results.popleft()))
        self.take_updates(outputs)
        self.verify()
        return outputs

    def turn(self) -> bool:
        """Plan as far ahead as allowed, then bring one thing home; False if nothing happened."""
        self.now += 1.0
        planned = False
        while self.plan() is not None:
            planned = True
        if self.events:
            self.deliver_event()
        elif self.results:
            self.commit()
        elif not planned and not self.scheduler.take_commands():
            return False
        return True

    def run(self, max_turns: int = 100_000) -> None:
        """Turn until everything has ended; fails if requests are left that nothing moves."""
        self.send_commands()
        for _ in range(max_turns):
            if not self.turn():
                break
        assert not self.scheduler.num_unfinished, "requests wait and nothing happens"
        self.check_all_ended()

    def settle(self) -> None:
        """Deliver every event that comes without running a step."""
        self.send_commands()
        while self.events:
            self.deliver_event()
            self.send_commands()

    # State seen from outside

    def resident(self) -> set[str]:
        """Contents in pages."""
        return {info["content_hash"] for info in self.list_resident()}

    def list_resident(self) -> list[dict[str, Any]]:
        return list(chain.from_iterable(self.scheduler.adapters.describe_resident()))

    def listed(self) -> dict[str, dict[str, Any]]:
        return {
            info["name"]: info for rows in self.scheduler.adapters.describe_all() for info in rows
        }

    def error_of(self, request_id: Any) -> tuple[str, str]:
        """Code and text of a request that must have ended with an error."""
        end = self.expected[request_id].end
        assert end is not None and end.finish_reason == "error"
        return end.error_code, end.error

    # Comparison with the oracle

    def verify(self) -> None:
        if self.check:
            self.scheduler.check_integrity()

    def take_updates(self, outputs: list[SequenceOutput] | None = None) -> None:
        for update in (outputs or []) + sequences(self.scheduler.outputs.take()):
            expectation = self.expected[self.name_of(update.request_id)]
            assert not expectation.aborted, "an aborted request got an update"
            assert expectation.end is None, "an update after the end"
            expectation.token_ids.extend(update.token_ids)
            expectation.num_cached_tokens = max(
                expectation.num_cached_tokens, update.num_cached_tokens
            )
            self._check_logprobs(expectation, update)
            if update.finish_reason:
                expectation.end = update
                if update.finish_reason != "error":
                    self.check_output(expectation)
        for reply in self.scheduler.adapters.take_updates():
            assert reply.reply_key not in self.adapter_updates
            self.adapter_updates[reply.reply_key] = reply

    def _check_logprobs(self, expectation: Expectation, update: SequenceOutput) -> None:
        for entry in update.logprobs:
            assert entry.token_ids[0] == expectation.token_ids[expectation.num_logprobs]
            expectation.num_logprobs += 1
        for entry in update.prompt_logprobs:
            expectation.num_prompt_logprobs += 1
            assert entry.token_ids[0] == expectation.prompt[expectation.num_prompt_logprobs]

    def content_of(self, expectation: Expectation) -> str | Weights:
        return expectation.weights(self.files)

    def oracle(self, expectation: Expectation) -> tuple[list[int], str, int]:
        """Returns tokens, finish reason and stop token of the whole answer."""
        return oracle(
            expectation.prompt,
            self.content_of(expectation),
            expectation.sampling,
            self.max_model_len,
            self.worker.vocab_size,
        )

    def check_output(self, expectation: Expectation) -> None:
        end = expectation.end
        assert end is not None
        token_ids, reason, stop_token_id = self.oracle(expectation)
        assert expectation.token_ids == token_ids
        assert (end.finish_reason, end.stop_token_id) == (reason, stop_token_id)
        if expectation.sampling.num_logprobs >= 0:
            assert expectation.num_logprobs == len(token_ids)
        if expectation.sampling.num_prompt_logprobs >= 0:
            assert expectation.num_prompt_logprobs == len(expectation.prompt) - 1

    def check_all_ended(self) -> None:
        """Every accepted request ended once, and all memory is free or can be had."""
        for request_id, expectation in self.expected.items():
            assert (expectation.end is None) == expectation.aborted, f"request {request_id}"
        stats = self.scheduler.stats()
        assert stats["running"] == stats["waiting"] == stats["pages_kv"] == 0
        assert all(adapter["num_users"] == 0 for adapter in self.list_resident())
        idle = stats["pages_free"] + stats["pages_prefix"] + stats["pages_adapter"]
        assert idle == stats["num_pages"]


def sequences(outputs: Outputs) -> list[SequenceOutput]:
    """The outputs of all frontends' sequences."""
    return [output for _, of_frontend in outputs for output in of_frontend]
