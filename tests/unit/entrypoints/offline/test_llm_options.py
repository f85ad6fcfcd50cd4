"""LLM's keywords against the configuration's fields."""

import dataclasses
import os
import typing
from typing import Any

import pytest
import torch

from loraplex.engine.config import EngineConfig
from loraplex.entrypoints.offline.options import LLMOptions, engine_config_of

# The server part configures the endpoint, which an LLM does not offer.
PARTS = {
    name: hint
    for name, hint in typing.get_type_hints(EngineConfig).items()
    if dataclasses.is_dataclass(hint) and name != "server"
}
OWN_NAMES = {"enable_lora", "max_loras"}


def test_keywords_are_the_configs_fields() -> None:
    names = {field.name for part in PARTS.values() for field in dataclasses.fields(part)}
    assert set(typing.get_type_hints(LLMOptions)) == (names - {"model"}) | OWN_NAMES


def test_keywords_have_the_fields_types() -> None:
    options = typing.get_type_hints(LLMOptions)
    for part in PARTS.values():
        for name, hint in typing.get_type_hints(part).items():
            if name in options and name not in ("adapters", "adapter_stores", "speculative_config"):
                assert options[name] == hint, name


def test_values_reach_their_part() -> None:
    config = engine_config_of(
        "m",
        {
            "dtype": "float32", "max_num_seqs": 4, "num_pages": 99, "lora_backend": "torch",
            "adapters": {"a": "/x", "b": "rel"}, "seed": 5, "max_loras": 7,
            "enable_lora": True, "tensor_parallel_size": 1,
        },
    )  # fmt: skip
    assert config.model.model == "m"
    assert (config.model.dtype, config.model.seed) == ("float32", 5)
    assert config.scheduler.max_num_seqs == 4
    assert (config.memory.num_pages, config.memory.max_adapter_slots) == (99, 7)
    assert config.backend.lora_backend == "torch"
    assert config.adapter.adapters == (("a", "/x"), ("b", os.path.abspath("rel")))
    assert config.adapter.adapter_root == "/"


def test_defaults_are_the_configs() -> None:
    config = engine_config_of("", {"adapter_root": ""})
    assert config == EngineConfig()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("max_model_length", "did you mean 'max_model_len'"),
        ("gpu_memory_utilisation", "did you mean 'gpu_memory_utilization'"),
        ("pipeline_parallel_size", "use tensor_parallel_size"),
        ("lora_dtype", "leave it out"),
        ("hf_token", "nothing is downloaded"),
        ("revision", "nothing is downloaded"),
        ("logits_processors", "use logit_bias"),
        ("zzz", "known: adapter_cache_bytes"),
        ("endpoint", "no keyword 'endpoint'"),
    ],
)
def test_unknown_keywords_name_the_nearest(name: str, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        engine_config_of("", {name: 2})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int4"}, "dtype must be one of"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be positive"),
    ],
)
def test_bad_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine_config_of("", options)


def test_adapters_must_be_a_map() -> None:
    with pytest.raises(TypeError, match="adapters must map names"):
        engine_config_of("", {"adapters": ["a"]})


@pytest.mark.parametrize(
    ("dtype", "name"),
    [("half", "float16"), ("float", "float32"), (torch.bfloat16, "bfloat16"), ("auto", "auto")],
)
def test_dtypes_are_named_as_in_vllm(dtype: Any, name: str) -> None:
    assert engine_config_of("", {"dtype": dtype}).model.dtype == name


def test_vllms_keywords_are_renamed_or_ignored() -> None:
    vllms = {
        "block_size": 32, "num_gpu_blocks_override": 99, "max_loras": 7, "max_cpu_loras": 2,
        "swap_space": 4, "enable_chunked_prefill": True, "trust_remote_code": True,
        "quantization": None, "pipeline_parallel_size": 1, "tokenizer_mode": "auto",
        "enable_lora": False, "seed": None, "tokenizer": None, "hf_overrides": {},
        "scheduling_policy": "priority",
    }  # fmt: skip
    own = {"block_tokens": 32, "num_pages": 99, "max_adapter_slots": 7}
    assert engine_config_of("m", vllms) == engine_config_of("m", own)


def test_vllms_names_of_fewer_bits() -> None:
    options = {"quantization": "fp8", "kv_cache_dtype": "fp8_e4m3"}
    assert engine_config_of("", options) == engine_config_of(
        "", {"quantization": "fp8", "kv_cache_dtype": "fp8"}
    )
    for method in ("awq", "gptq", "compressed-tensors", None):  # the checkpoint says so itself
        assert engine_config_of("", {"quantization": method}) == engine_config_of("", {})
    for name in ("quantization", "kv_cache_dtype"):
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            engine_config_of("", {name: "int2"})


def test_a_keyword_and_its_alias_are_not_given_both() -> None:
    with pytest.raises(ValueError, match="leave one out"):
        engine_config_of("", {"max_loras": 3, "max_adapter_slots": 4})
