"""Answers requests step by step; class, methods and arguments are named as in vLLM."""

import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any

from loraplex.engine.config import EngineConfig
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.entrypoints.client.lora_mix import LoRA
from loraplex.entrypoints.client.lora_request import LoRARequest
from loraplex.entrypoints.client.outputs import RequestFailure, RequestOutput, RequestResult
from loraplex.entrypoints.offline.batch_request import make_batch
from loraplex.entrypoints.offline.engine_args import EngineArgs
from loraplex.entrypoints.offline.local_engine import LocalEngine
from loraplex.entrypoints.offline.lora_ids import LoRAIds
from loraplex.entrypoints.offline.prompts import Prompt, completion_prompts


class LLMEngine:
    """Takes requests at any time and returns what they have generated at each step.

    The engine's processes run on between the steps. Use it from one thread.
    """

    def __init__(self, engine: LocalEngine) -> None:
        """Makes an LLMEngine that does not own `engine`; from_engine_args() starts one."""
        self._client = engine.client
        self._engine = engine
        self._lora_ids = LoRAIds()
        self._unfinished: set[str] = set()
        self._results: deque[RequestResult] = deque()

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs, **_: Any) -> "LLMEngine":
        """Starts an engine, which ends at shutdown() or with this object.

        vLLM's other arguments, such as usage_context, are ignored.

        Raises:
            ConfigError: the engine cannot start; the text says what to change.
        """
        return cls.from_vllm_config(engine_args.create_engine_config())

    @classmethod
    def from_vllm_config(cls, vllm_config: EngineConfig, **_: Any) -> "LLMEngine":
        """Starts an engine as from_engine_args() does, of what create_engine_config() returned."""
        local = LocalEngine(vllm_config, in_process=False)
        engine = cls(local)
        weakref.finalize(engine, local.close)
        return engine

    def add_request(  # noqa: PLR0913  # the arguments are vLLM's
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        arrival_time: float | None = None,
        lora_request: LoRA | None = None,
        *,
        priority: int = 0,
    ) -> str:
        """Sends a request. step() returns its outputs, which are of its `output_kind`.

        `arrival_time` is ignored: a request arrives when it is sent.

        Raises:
            ValueError, TypeError: an argument is wrong, or the id is in use; nothing was sent.
        """
        if not isinstance(request_id, str):
            raise TypeError(f"request_id must be a string, got {request_id!r}")
        (request,) = make_batch(completion_prompts([prompt]), params, lora_request, priority)
        self._client.submit(
            request.prompt,
            request.sampling_params,
            adapter=request.adapter,
            request_id=request_id,
            salt=request.salt,
            priority=request.priority,
            stream=True,
        )
        self._unfinished.add(request_id)
        return request_id

    def step(self) -> list[RequestOutput]:
        """Waits until some request has an output. Returns the outputs that have come.

        Raises:
            ClientError: the engine refused a request, which has ended. The others go on.
            EngineDeadError: a process of the engine ended.
        """
        if self._unfinished and not self._results:
            results = self._client.poll()
            self._results.extend(r for r in results if r.request_id in self._unfinished)
        outputs: list[RequestOutput] = []
        while self._results:
            result = self._results[0]
            if isinstance(result, RequestFailure):
                if outputs:
                    break  # the next step raises the error
                self._results.popleft()
                self._unfinished.discard(result.request_id)
                raise result.error
            self._results.popleft()
            if result.finished:
                self._unfinished.discard(result.request_id)
            outputs.append(result)
        return outputs

    def has_unfinished_requests(self) -> bool:
        """Tells whether step() has outputs to come."""
        return bool(self._unfinished)

    def get_num_unfinished_requests(self) -> int:
        """Returns the number of requests whose end step() has not returned."""
        return len(self._unfinished)

    def abort_request(self, request_ids: str | Iterable[str]) -> None:
        """Ends requests, of which step() returns nothing more. Ignores unknown ids."""
        for request_id in [request_ids] if isinstance(request_ids, str) else list(request_ids):
            if request_id in self._unfinished:
                self._unfinished.discard(request_id)
                self._client.cancel(request_id)
        kept = [r for r in self._results if r.request_id in self._unfinished]
        self._results = deque(kept)

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Loads an adapter. Returns False if it is loaded and `load_inplace` is not set.

        Raises:
            ValueError: the id is another adapter's, or the files cannot be served.
        """
        is_known = self._lora_ids.has(lora_request)
        if is_known and not lora_request.load_inplace:
            return False
        if is_known:
            self._client.unload_adapter(lora_request.lora_name)
            self._lora_ids.remove(lora_request.lora_int_id)
        if lora_request.lora_tensors is not None:
            self._client.load_adapter_tensors(
                lora_request.lora_name, lora_request.peft_config, lora_request.lora_tensors
            )
        else:
            self._client.load_adapter(lora_request.lora_name, lora_request.absolute_path)
        self._lora_ids.add(lora_request)
        return True

    def remove_lora(self, lora_id: int) -> bool:
        """Removes an adapter that add_lora() loaded. Returns False if there is none."""
        if lora_id not in self._lora_ids.ids:
            return False
        self._client.unload_adapter(self._lora_ids.name_of(lora_id))
        self._lora_ids.remove(lora_id)
        return True

    def pin_lora(self, lora_id: int) -> bool:
        """Keeps an adapter that add_lora() loaded in pages.

        Raises:
            ValueError: add_lora() has not loaded it, or too much is pinned.
        """
        self._client.pin_adapter(self._lora_ids.name_of(lora_id))
        return True

    def list_loras(self) -> set[int]:
        """Returns the ids of the adapters that add_lora() has loaded."""
        return self._lora_ids.ids

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Empties the prefix cache and returns True. vLLM's arguments are ignored."""
        self._client.reset_prefix_cache()
        return True

    def shutdown(self) -> None:
        """Stops the engine's processes. Calling again does nothing."""
        self._engine.close()
