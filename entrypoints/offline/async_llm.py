"""Answers requests from asyncio code; class, methods and arguments are named as in vLLM."""

import asyncio
import weakref
from collections.abc import AsyncIterator, Iterable
from typing import Any

from loraplex.engine.config import EngineConfig
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.entrypoints.client.async_client import AsyncClient
from loraplex.entrypoints.client.lora_mix import LoRA
from loraplex.entrypoints.client.lora_request import LoRARequest
from loraplex.entrypoints.client.outputs import RequestOutput
from loraplex.entrypoints.offline.batch_request import make_batch
from loraplex.entrypoints.offline.engine_args import EngineArgs
from loraplex.entrypoints.offline.local_engine import LocalEngine
from loraplex.entrypoints.offline.lora_ids import LoRAIds
from loraplex.entrypoints.offline.prompts import Prompt, completion_prompts


class AsyncLLM:
    """Starts an engine and streams answers. Use it from one event loop, in any number of tasks."""

    def __init__(self, engine: LocalEngine) -> None:
        """Takes over a started engine; from_engine_args() starts one."""
        self._client = AsyncClient(engine.endpoint)
        self._lora_ids = LoRAIds()
        self._closing: asyncio.Task[None] | None = None
        self._finalizer = weakref.finalize(self, engine.close)

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs, **_: Any) -> "AsyncLLM":
        """Starts an engine, which blocks until it is ready.

        vLLM's other arguments, such as usage_context, are ignored.

        Raises:
            ConfigError: the engine cannot start; the text says what to change.
        """
        return cls.from_vllm_config(engine_args.create_engine_config())

    @classmethod
    def from_vllm_config(cls, vllm_config: EngineConfig, **_: Any) -> "AsyncLLM":
        """Starts an engine as from_engine_args() does, of what create_engine_config() returned."""
        return cls(LocalEngine(vllm_config, in_process=False))

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        lora_request: LoRA | None = None,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Yields outputs of the request's `output_kind` until it has finished.

        Leaving the iteration early cancels the request.

        Raises:
            ValueError, TypeError: an argument is wrong, or the id is in use.
            ClientError: the engine refused the request.
            EngineDeadError: the engine ended.
        """
        prompts = completion_prompts([prompt])
        (request,) = make_batch(prompts, sampling_params, lora_request, priority)
        outputs = self._client.generate(
            request.prompt,
            request.sampling_params,
            adapter=request.adapter,
            request_id=request_id,
            salt=request.salt,
            priority=request.priority,
        )
        try:
            async for output in outputs:
                yield output
        finally:
            await outputs.aclose()  # type: ignore[attr-defined]

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """Ends requests: their generate() yields a last output with finish_reason "abort"."""
        for own_id in [request_id] if isinstance(request_id, str) else list(request_id):
            await self._client.cancel(own_id)

    async def check_health(self) -> None:
        """Raises EngineDeadError if the engine does not answer."""
        await self._client.health()

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        """Loads an adapter. Returns False if it is loaded and `load_inplace` is not set.

        Raises:
            ValueError: the id is another adapter's, or the files cannot be served.
        """
        if self._lora_ids.has(lora_request):
            if not lora_request.load_inplace:
                return False
            await self.remove_lora(lora_request.lora_int_id)
        if lora_request.lora_tensors is not None:
            await self._client.load_adapter_tensors(
                lora_request.lora_name, lora_request.peft_config, lora_request.lora_tensors
            )
        else:
            await self._client.load_adapter(lora_request.lora_name, lora_request.absolute_path)
        self._lora_ids.add(lora_request)
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        """Removes an adapter that add_lora() loaded. Returns False if there is none."""
        if lora_id not in self._lora_ids.ids:
            return False
        await self._client.unload_adapter(self._lora_ids.name_of(lora_id))
        self._lora_ids.remove(lora_id)
        return True

    async def pin_lora(self, lora_id: int) -> bool:
        """Keeps an adapter that add_lora() loaded in pages.

        Raises:
            ValueError: add_lora() has not loaded it, or too much is pinned.
        """
        await self._client.pin_adapter(self._lora_ids.name_of(lora_id))
        return True

    async def list_loras(self) -> set[int]:
        """Returns the ids of the adapters that add_lora() has loaded."""
        return self._lora_ids.ids

    async def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Empties the prefix cache and returns True. vLLM's arguments are ignored."""
        await self._client.reset_prefix_cache()
        return True

    def shutdown(self) -> None:
        """Stops the engine's processes. Calling again does nothing."""
        if not self._finalizer.alive:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            self._closing = loop.create_task(self._client.close())
        self._finalizer()


AsyncLLMEngine = AsyncLLM
"""vLLM's former name of the class."""
