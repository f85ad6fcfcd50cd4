"""Translates keywords of vLLM's LLM and EngineArgs.

A keyword of vLLM is renamed, or ignored where it changes no answer, or refused with advice.
"""

import json
from collections.abc import Mapping
from typing import Any

RENAMED = {
    "block_size": "block_tokens",
    "kv_cache_memory_bytes": "pool_bytes",
    "max_loras": "max_adapter_slots",
    "num_gpu_blocks_override": "num_pages",
}
"""Maps names of vLLM to loraplex's. None stands for a keyword that is not given."""

IGNORED: dict[str, Any] = {
    "allowed_local_media_path": "",
    "async_scheduling": None,
    "compilation_config": None,
    "cudagraph_capture_sizes": None,
    "disable_async_output_proc": False,
    "disable_cascade_attn": False,
    "disable_custom_all_reduce": False,
    "disable_log_requests": False,
    "disable_log_stats": False,
    "distributed_executor_backend": None,
    "enable_chunked_prefill": None,
    "enable_log_requests": False,
    "enable_lora": True,
    "fully_sharded_loras": False,
    "limit_mm_per_prompt": None,
    "max_cpu_loras": None,
    "max_logprobs": 20,
    "max_num_partial_prefills": 1,
    "max_parallel_loading_workers": None,
    "max_seq_len_to_capture": None,
    "served_model_name": None,
    "structured_outputs_config": None,
    "swap_space": 4,
    "trust_remote_code": False,
    "use_tqdm_on_load": True,
}
"""Maps keywords that change no answer to vLLM's defaults.

They concern speed, memory or logs, which loraplex manages alone, or code that it never runs. An
adapter costs nothing until a request uses it, so `enable_lora` has nothing to switch.
"""

NEUTRAL: dict[str, tuple[object, ...]] = {
    "cpu_offload_gb": (0, None),
    "data_parallel_size": (1, None),
    "download_dir": (None,),
    "enable_sleep_mode": (False, True, None),
    "generation_config": ("auto", None),
    "hf_overrides": (None, {}),
    "hf_token": (None, False),
    "logits_processors": (None, []),
    "lora_dtype": ("auto", None),
    "override_generation_config": (None, {}),
    "pipeline_parallel_size": (1, None),
    "revision": (None,),
    "runner": ("auto", "generate", None),
    "scheduling_policy": ("fcfs", "priority", None),  # fcfs obeys priorities
    "tokenizer_mode": ("auto", None),
    "tokenizer_revision": (None,),
}
"""Values that say what loraplex does anyway, vLLM's default first. Others are refused."""

ADVICE = {
    "cpu_offload_gb": "weights stay on the device; leave it out",
    "data_parallel_size": "start one engine for each replica",
    "download_dir": "nothing is downloaded: give a local folder as model",
    "generation_config": "leave it out, and give each request its SamplingParams",
    "hf_overrides": "change config.json in the model's folder",
    "hf_token": "nothing is downloaded: give a local folder as model",
    "logits_processors": "use logit_bias, bad_words or structured_outputs of SamplingParams",
    "lora_dtype": "adapters have the model's type; leave it out, or use adapter_dtype",
    "override_generation_config": "give each request its SamplingParams",
    "pipeline_parallel_size": "use tensor_parallel_size",
    "revision": "nothing is downloaded: give a local folder as model",
    "runner": "only text is generated; leave it out",
    "scheduling_policy": "use policy",
    "tokenizer_mode": "leave it out",
    "tokenizer_revision": "nothing is downloaded: give a local folder as tokenizer",
}
"""Maps keywords that loraplex does not have to the mend."""

_SPELLINGS = {
    ("kv_cache_dtype", "fp8_e4m3"): "fp8",
    ("quantization", "awq"): "auto",
    ("quantization", "compressed-tensors"): "auto",
    ("quantization", "gptq"): "auto",
}
"""vLLM's values of keywords that loraplex has too. A checkpoint says itself how it is stored."""

_DTYPES = {"half": "float16", "float": "float32"}


def vllm_defaults() -> dict[str, Any]:
    """Returns vLLM's keywords and their defaults; None for those that have another name here."""
    neutral = {name: values[0] for name, values in NEUTRAL.items()}
    return {**dict.fromkeys(RENAMED), **IGNORED, **neutral}


def translated(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keywords under loraplex's names, without those that change nothing here.

    Args:
        defaults: those of loraplex's own keywords. None stands for them, as it does in vLLM.

    Raises:
        ValueError: an alias and its name are given different values.
    """
    values: dict[str, Any] = {}
    for name, value in options.items():
        is_neutral = name in NEUTRAL and value in NEUTRAL[name]
        is_default = value is None and name in defaults
        if name not in IGNORED and name not in RENAMED and not is_neutral and not is_default:
            values[name] = value
    for alias, name in RENAMED.items():
        value = options.get(alias)
        if value is None:
            continue
        if values.get(name, defaults[name]) not in (defaults[name], value):
            raise ValueError(f"{name} is given twice, also as {alias}: leave one out")
        values[name] = value
    if isinstance(config := values.get("speculative_config"), Mapping):
        values["speculative_config"] = json.dumps(dict(config))
    if "dtype" in values:
        dtype = str(values["dtype"]).removeprefix("torch.")  # of a torch.dtype, its name
        values["dtype"] = _DTYPES.get(dtype, dtype)
    for (name, spelling), own in _SPELLINGS.items():
        if values.get(name) == spelling:
            values[name] = own
    return values
