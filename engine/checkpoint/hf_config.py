"""Reads a model's spec from config.json and generation_config.json."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loraplex.engine.checkpoint.quantization import read_quantization
from loraplex.engine.errors import ConfigError
from loraplex.engine.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class ArchitectureTraits:
    """Differences between the supported architectures."""

    qkv_bias: bool = False  # if False, the config's `attention_bias` decides
    qk_norm: bool = False
    reads_attention_bias: bool = False
    reads_mlp_bias: bool = False
    reads_window: bool = False
    window_is_optional: bool = False  # off unless the config says use_sliding_window
    default_head_dim: int | None = None  # if the config names none; None: hidden / heads


ARCHITECTURES = {
    "LlamaForCausalLM": ArchitectureTraits(reads_attention_bias=True, reads_mlp_bias=True),
    "MistralForCausalLM": ArchitectureTraits(reads_window=True),
    "Qwen2ForCausalLM": ArchitectureTraits(
        qkv_bias=True, reads_window=True, window_is_optional=True
    ),
    "Qwen3ForCausalLM": ArchitectureTraits(
        qk_norm=True,
        reads_attention_bias=True,
        reads_window=True,
        window_is_optional=True,
        default_head_dim=128,
    ),
}

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_DEFAULT_WINDOW = 4096  # Hugging Face's default for a missing field; null means no window
ROPE_TYPES = ("default", "linear", "llama3")


def spec_from_config(model_path: Path) -> tuple[ModelSpec, bytes]:
    """Returns the spec and the bytes of config.json.

    Raises:
        ConfigError: see load_spec.
    """
    path = model_path / "config.json"
    try:
        header = path.read_bytes()
    except OSError as error:
        if (model_path / "adapter_config.json").is_file():
            raise ConfigError(
                f"{model_path} is a LoRA adapter, not a model: give its base model as --model and "
                f"the adapter as --adapter NAME={model_path}"
            ) from None
        raise ConfigError(f"{model_path} has no readable config.json: {error}") from None
    config = _parse(path, header)
    architecture = find_architecture(config, model_path)
    _refuse_unsupported(config, model_path)
    try:
        return _build(model_path, architecture, config), header
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        what = f"the field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"{path}: {what}") from None


def find_architecture(config: dict[str, Any], model_path: Path) -> str:
    """Returns the supported architecture that config.json names.

    Raises:
        ConfigError: it names none; the text lists the supported ones.
    """
    named = config.get("architectures") or []
    for architecture in named:
        if architecture in ARCHITECTURES:
            return architecture
    what = ", ".join(map(str, named)) or f"model_type {config.get('model_type')!r}"
    raise ConfigError(
        f"{model_path}: architecture {what} is not supported; supported: "
        f"{', '.join(sorted(ARCHITECTURES))}"
    )


def rope_scaling(config: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Returns RoPE's base and its scaling ({} for none).

    Reads `rope_parameters`, and the older `rope_theta` and `rope_scaling`.

    Raises:
        ValueError: the type of scaling is not supported.
    """
    merged = dict(config.get("rope_scaling") or {})
    merged.update(config.get("rope_parameters") or {})
    theta = float(merged.pop("rope_theta", None) or config.get("rope_theta") or 10000.0)
    # `type` is the older name; files of Llama 3.1 carry both.
    old_name = merged.pop("type", None)
    kind = merged.pop("rope_type", None) or old_name or "default"
    partial = merged.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor")
    if partial not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor {partial} is not supported (only 1)")
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope scaling {kind!r} is not supported; supported: {list(ROPE_TYPES)}")
    if kind == "default":
        return theta, {}
    if kind == "linear":
        return theta, {"rope_type": "linear", "factor": float(merged["factor"])}
    scaling: dict[str, Any] = {"rope_type": "llama3"}
    for name in ("factor", "low_freq_factor", "high_freq_factor"):
        scaling[name] = float(merged[name])
    scaling["original_max_position_embeddings"] = int(
        merged.get("original_max_position_embeddings") or config["max_position_embeddings"]
    )
    if scaling["high_freq_factor"] == scaling["low_freq_factor"]:
        raise ValueError("rope scaling llama3: high_freq_factor equals low_freq_factor")
    return theta, scaling


def _build(model_path: Path, architecture: str, config: dict[str, Any]) -> ModelSpec:
    traits = ARCHITECTURES[architecture]
    num_heads = int(config["num_attention_heads"])
    num_kv_heads = int(config.get("num_key_value_heads") or num_heads)
    hidden_size = int(config["hidden_size"])
    head_dim = int(config.get("head_dim") or traits.default_head_dim or hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} heads are not a multiple of {num_kv_heads} KV heads")
    theta, scaling = rope_scaling(config)
    attention_bias = traits.reads_attention_bias and bool(config.get("attention_bias", False))
    return ModelSpec(
        architecture=architecture,
        hidden_size=hidden_size,
        intermediate_size=int(config["intermediate_size"]),
        num_layers=int(config["num_hidden_layers"]),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=int(config["vocab_size"]),
        max_position=_max_position(config, traits),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=traits.qkv_bias or attention_bias,
        output_bias=attention_bias,
        mlp_bias=traits.reads_mlp_bias and bool(config.get("mlp_bias", False)),
        qk_norm=traits.qk_norm,
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        dtype=_dtype(config),
        eos_token_ids=_eos_token_ids(model_path, config),
        bos_token_id=config.get("bos_token_id"),
    )


def _refuse_unsupported(config: dict[str, Any], model_path: Path) -> None:
    read_quantization(config, model_path)
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ConfigError(f"{model_path}: hidden_act {activation!r} is not supported (only silu)")


def _max_position(config: dict[str, Any], traits: ArchitectureTraits) -> int:
    """Returns the longest context. For a model with a sliding window that is the window.

    Up to there it attends to every token. A missing `max_position_embeddings` raises KeyError,
    because a guess could cut or overrun the context.
    """
    limit = int(config["max_position_embeddings"])
    layer_types = config.get("layer_types")
    if (
        not traits.reads_window
        or (traits.window_is_optional and not config.get("use_sliding_window", False))
        or (layer_types and "sliding_attention" not in layer_types)
    ):
        return limit
    window = config.get("sliding_window", _DEFAULT_WINDOW)
    return min(limit, int(window)) if window else limit


def _dtype(config: dict[str, Any]) -> torch.dtype:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    name = name.removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"dtype {name!r} is not supported; supported: {sorted(_DTYPES)}")
    return _DTYPES[name]


def _eos_token_ids(model_path: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """Reads generation_config.json before config.json, as Hugging Face's generate() does."""
    path = model_path / "generation_config.json"
    eos = _parse(path, path.read_bytes()).get("eos_token_id") if path.is_file() else None
    if eos is None:
        eos = config.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(int(i) for i in eos) if isinstance(eos, list) else (int(eos),)


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return config
