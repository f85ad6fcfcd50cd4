"""An engine's client without an engine: answers in a chosen order, and keeps count."""

import random
from types import SimpleNamespace
from typing import Any

from loraplex.engine.errors import LoraplexError
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.entrypoints.client.lora_request import LoRARequest
from loraplex.entrypoints.client.outputs import CompletionOutput, RequestFailure, RequestOutput


class FakeClient:
    """Finishes a few of the outstanding requests at each poll, in random order.

    `failures` maps a prompt's text to the error that it ends with; `interrupt_at` raises
    KeyboardInterrupt at that poll; `dies_at` fails what is outstanding.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.outstanding: dict[str, tuple[Any, SamplingParams, LoRARequest | None]] = {}
        self.submitted: list[str] = []
        self.cancelled: list[str] = []
        self.adapters: list[LoRARequest | None] = []
        self.prompts: list[dict[str, Any]] = []
        self.salts: list[str] = []
        self.priorities: list[int] = []
        self.max_sequences = 0
        self.num_polls = 0
        self.failures: dict[str, LoraplexError] = {}
        self.interrupt_at = -1
        self.dies_at = -1

    @property
    def num_outstanding(self) -> int:
        return len(self.outstanding)

    def submit(
        self,
        prompt: dict[str, Any],
        sampling_params: SamplingParams,
        *,
        adapter: LoRARequest | None,
        request_id: str,
        salt: str,
        priority: int,
    ) -> str:
        assert request_id not in self.submitted, "an id is never used twice"
        self.submitted.append(request_id)
        self.outstanding[request_id] = (prompt, sampling_params, adapter)
        self.prompts.append(prompt)
        self.adapters.append(adapter)
        self.salts.append(salt)
        self.priorities.append(priority)
        num = sum(params.n for _, params, _ in self.outstanding.values())
        self.max_sequences = max(self.max_sequences, num)
        return request_id

    def poll(self, timeout_s: float | None = None) -> list[RequestOutput | RequestFailure]:
        self.num_polls += 1
        if self.num_polls == self.interrupt_at:
            raise KeyboardInterrupt
        if self.num_polls == self.dies_at:
            return self._die()
        ids = list(self.outstanding)
        self.random.shuffle(ids)
        return [self._end(request_id) for request_id in ids[: self.random.randint(0, 7)]]

    def _die(self) -> list[RequestOutput | RequestFailure]:
        from loraplex.engine.errors import EngineDeadError

        ids = list(self.outstanding)
        self.outstanding.clear()
        return [RequestFailure(i, EngineDeadError("the engine is dead")) for i in ids]

    def _end(self, request_id: str) -> RequestOutput | RequestFailure:
        prompt, params, adapter = self.outstanding.pop(request_id)
        text = str(prompt.get("prompt") or prompt.get("prompt_token_ids") or prompt["messages"])
        if text in self.failures:
            return RequestFailure(request_id, self.failures[text])
        name = adapter.lora_name if adapter else "base"
        reason = "abort" if request_id in self.cancelled else "length"
        answers = [
            CompletionOutput(i, f"{name}:{text}", [1, 2, 3], finish_reason=reason)
            for i in range(params.n)
        ]
        return RequestOutput(request_id, text, [7, 8], None, answers, True, adapter, 0)

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def close(self) -> None:
        pass


class FakeEngine:
    """Stands in for LocalEngine; the last one made is `FakeEngine.last`."""

    last: "FakeEngine"

    def __init__(self, config: Any, *, in_process: bool) -> None:
        self.config = config
        self.in_process = in_process
        self.client = FakeClient()
        self.info = SimpleNamespace(max_model_len=128)
        self.dead_reason: str | None = None
        self.death_is_known = False
        self.num_closed = 0
        self.is_sleeping = False
        FakeEngine.last = self

    def death(self, wait_s: float = 0.0) -> str | None:
        return self.dead_reason if wait_s or self.death_is_known else None

    def close(self) -> None:
        self.num_closed += 1
