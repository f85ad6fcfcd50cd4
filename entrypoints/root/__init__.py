"""Serves one base model with thousands of LoRA adapters, any mix of them in one batch.

The public names are imported on first use, so that ``import loraplex`` loads no GPU library.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraplex.engine.frontend.sampling_params import (
        RequestOutputKind as RequestOutputKind,
    )
    from loraplex.engine.frontend.sampling_params import (
        SamplingParams as SamplingParams,
    )
    from loraplex.engine.frontend.structured.structured_outputs import (
        StructuredOutputsParams as StructuredOutputsParams,
    )
    from loraplex.entrypoints.client.async_client import AsyncClient as AsyncClient
    from loraplex.entrypoints.client.lora_mix import LoRAMix as LoRAMix
    from loraplex.entrypoints.client.lora_request import LoRARequest as LoRARequest
    from loraplex.entrypoints.client.outputs import CompletionOutput as CompletionOutput
    from loraplex.entrypoints.client.outputs import RequestOutput as RequestOutput
    from loraplex.entrypoints.client.sync_client import Client as Client
    from loraplex.entrypoints.offline.async_llm import AsyncLLM as AsyncLLM
    from loraplex.entrypoints.offline.async_llm import AsyncLLMEngine as AsyncLLMEngine
    from loraplex.entrypoints.offline.cluster import Cluster as Cluster
    from loraplex.entrypoints.offline.engine_args import AsyncEngineArgs as AsyncEngineArgs
    from loraplex.entrypoints.offline.engine_args import EngineArgs as EngineArgs
    from loraplex.entrypoints.offline.llm import LLM as LLM
    from loraplex.entrypoints.offline.llm_engine import LLMEngine as LLMEngine
    from loraplex.entrypoints.offline.prompts import TextPrompt as TextPrompt
    from loraplex.entrypoints.offline.prompts import TokensPrompt as TokensPrompt

__version__ = "0.1.0"

_HOMES = {
    "LLM": "loraplex.entrypoints.offline.llm",
    "AsyncLLM": "loraplex.entrypoints.offline.async_llm",
    "AsyncLLMEngine": "loraplex.entrypoints.offline.async_llm",
    "LLMEngine": "loraplex.entrypoints.offline.llm_engine",
    "EngineArgs": "loraplex.entrypoints.offline.engine_args",
    "AsyncEngineArgs": "loraplex.entrypoints.offline.engine_args",
    "SamplingParams": "loraplex.engine.frontend.sampling_params",
    "StructuredOutputsParams": "loraplex.engine.frontend.structured.structured_outputs",
    "RequestOutputKind": "loraplex.engine.frontend.sampling_params",
    "LoRARequest": "loraplex.entrypoints.client.lora_request",
    "LoRAMix": "loraplex.entrypoints.client.lora_mix",
    "RequestOutput": "loraplex.entrypoints.client.outputs",
    "CompletionOutput": "loraplex.entrypoints.client.outputs",
    "TextPrompt": "loraplex.entrypoints.offline.prompts",
    "TokensPrompt": "loraplex.entrypoints.offline.prompts",
    "Cluster": "loraplex.entrypoints.offline.cluster",
    "Client": "loraplex.entrypoints.client.sync_client",
    "AsyncClient": "loraplex.entrypoints.client.async_client",
}
__all__ = [*_HOMES, "__version__"]


if not TYPE_CHECKING:  # a checker that saw it would take any name

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'loraplex' has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
