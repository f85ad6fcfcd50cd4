"""Turns the keywords of `LLM` into a configuration."""

import difflib
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, TypedDict

from loraplex.engine.config import EngineConfig
from loraplex.entrypoints.offline.vllm_keywords import ADVICE, translated


class LLMOptions(TypedDict, total=False):
    """The fields of EngineConfig except the server's; see `loraplex serve -h`.

    `enable_lora` and `max_loras` are vLLM's names: `enable_lora` is ignored, as an adapter costs
    nothing until a request uses it, and `max_loras` is `max_adapter_slots`. More of vLLM's keywords
    work: see docs/reference/vllm.md.
    """

    tokenizer: str
    skip_tokenizer_init: bool
    chat_template: str
    dtype: str
    load_format: str
    quantization: str
    max_model_len: int | None
    device: str
    seed: int
    adapters: Mapping[str, str | os.PathLike[str]]
    adapter_mixes: tuple[tuple[str, str], ...]
    adapter_dir: str
    adapter_root: str
    adapter_stores: Sequence[str]
    adapter_store_ttl_s: float
    adapter_store_timeout_s: float
    adapter_store_max_bytes: int
    adapter_cache_dir: str
    adapter_cache_bytes: int
    block_tokens: int
    kv_cache_dtype: str
    adapter_dtype: str
    gpu_memory_utilization: float
    pool_bytes: int | None
    num_pages: int | None
    enable_prefix_caching: bool
    max_adapter_slots: int
    adapter_host_bytes: int
    max_lora_rank: int
    max_token_rows: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_queue_len: int
    max_adapters_per_tenant: int
    max_steps_in_flight: int
    speculative_config: str | Mapping[str, object] | None
    policy: str
    max_wait_s: float
    max_adapters_per_batch: int
    ttft_slo_s: float
    fair_share_by: str
    fair_share_weights: tuple[tuple[str, str], ...]
    enforce_eager: bool
    graph_bytes: int
    graph_seconds: float
    profile_dir: str
    profile_steps: int
    profile_every: int
    lora_backend: str
    attention_backend: str
    fused_backend: str
    linear_backend: str
    collective_backend: str
    tensor_parallel_size: int
    watchdog_timeout: float
    enable_lora: bool
    max_loras: int


_PARTS = ("model", "adapter", "store", "memory", "scheduler", "backend", "parallel", "process",
          "graph", "profile")  # fmt: skip


def option_defaults() -> dict[str, Any]:
    """Returns the keywords of the configuration and their defaults."""
    hints = typing.get_type_hints(EngineConfig)
    values = {
        field.name: field.default
        for part in _PARTS
        for field in fields(hints[part])
        if field.default is not MISSING
    }
    del values["model"]
    return {**values, "adapters": {}, "adapter_root": os.path.abspath(os.sep)}


def engine_config_of(model: str, options: Mapping[str, Any]) -> EngineConfig:
    """Builds a configuration from the keywords.

    `adapter_root` defaults to the whole file system. Only the caller can reach the engine's
    private endpoint, and it can read those files anyway.

    Raises:
        TypeError: a keyword is unknown; the message names the most similar one.
        ValueError: a value is out of range.
    """
    defaults = option_defaults()
    values = {"adapter_root": defaults["adapter_root"], **translated(options, defaults)}
    values["model"] = model
    if "adapters" in values:
        values["adapters"] = _adapter_pairs(values["adapters"])
    if "adapter_stores" in values:
        values["adapter_stores"] = _store_addresses(values["adapter_stores"])
    parts = {}
    for part in _PARTS:
        cls = typing.get_type_hints(EngineConfig)[part]
        names = {field.name for field in fields(cls)}
        parts[part] = cls(**{name: values.pop(name) for name in names & values.keys()})
    if values:
        raise TypeError("; ".join(_unknown(name) for name in sorted(values)))
    return EngineConfig(**parts)


def _adapter_pairs(adapters: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(adapters, Mapping):
        raise TypeError(f"adapters must map names to directories, got {adapters!r:.80}")
    return tuple((str(name), os.path.abspath(path)) for name, path in adapters.items())


def _store_addresses(stores: Any) -> tuple[str, ...]:
    if isinstance(stores, str) or not isinstance(stores, Sequence):
        raise TypeError(f"adapter_stores must be a list of addresses, got {stores!r:.80}")
    return tuple(os.fspath(store) for store in stores)


def _unknown(name: str) -> str:
    if name in ADVICE:
        return f"LLM() has no keyword {name!r}: {ADVICE[name]}"
    known = list(typing.get_type_hints(LLMOptions))
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
    return f"LLM() has no keyword {name!r}; {hint}"
