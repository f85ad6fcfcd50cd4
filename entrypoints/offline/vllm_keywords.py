"""Translates keywords of vLLM's LLM and EngineArgs.

A keyword of vLLM is renamed, or ignored where it changes no answer, or refused with advice.
"""

from collections.abc import Mapping
from typing import Any

_ALIASES = {
    "block_size": "block_tokens",
    "kv_cache_memory_bytes": "pool_bytes",
    "max_loras": "max_adapter_slots",
    "num_gpu_blocks_override": "num_pages",
}
_IGNORED = {
    "disable_custom_all_reduce",
    "disable_log_requests",
    "disable_log_stats",
    "enable_chunked_prefill",
    "fully_sharded_loras",
    "max_cpu_loras",
    "max_seq_len_to_capture",
    "swap_space",
    "trust_remote_code",
}
"""They concern memory or logs, which loraplex manages alone, or code that it never runs."""

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "cpu_offload_gb": (0, None),
    "data_parallel_size": (1, None),
    "download_dir": (None,),
    "hf_token": (None, False),
    "lora_dtype": ("auto", None),
    "kv_cache_dtype": ("auto", None),
    "pipeline_parallel_size": (1, None),
    "quantization": (None,),
    "revision": (None,),
    "runner": ("auto", "generate", None),
    "scheduling_policy": ("fcfs", None),
    "speculative_config": (None,),
    "tokenizer_mode": ("auto", None),
    "tokenizer_revision": (None,),
}
"""Values that say what loraplex does anyway. Others are refused."""

ADVICE = {
    "cpu_offload_gb": "weights stay on the device; leave it out",
    "data_parallel_size": "start one engine for each replica",
    "download_dir": "nothing is downloaded: give a local folder as model",
    "hf_token": "nothing is downloaded: give a local folder as model",
    "kv_cache_dtype": "keys and values have the model's type; leave it out",
    "lora_dtype": "adapters have the model's type; leave it out",
    "pipeline_parallel_size": "use tensor_parallel_size",
    "quantization": "the format is read from the checkpoint; leave it out",
    "revision": "nothing is downloaded: give a local folder as model",
    "runner": "only text is generated; leave it out",
    "scheduling_policy": "use policy",
    "speculative_config": "there is no speculative decoding; leave it out",
    "tokenizer_mode": "leave it out",
    "tokenizer_revision": "nothing is downloaded: give a local folder as tokenizer",
}
"""Maps keywords that loraplex does not have to the mend."""

_DTYPES = {"half": "float16", "float": "float32"}


def translated(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keywords under loraplex's names, without those that change nothing here.

    Raises:
        ValueError: an alias and its name are both given.
    """
    values: dict[str, Any] = {}
    for name, value in options.items():
        if name in _IGNORED or (name in _NEUTRAL and value in _NEUTRAL[name]):
            continue
        own_name = _ALIASES.get(name, name)
        if own_name in values:
            raise ValueError(f"{own_name} is given twice, also as {name}: leave one out")
        values[own_name] = value
    if "dtype" in values:
        dtype = str(values["dtype"]).removeprefix("torch.")  # of a torch.dtype, its name
        values["dtype"] = _DTYPES.get(dtype, dtype)
    return values
