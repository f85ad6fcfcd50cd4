"""Configurations of known models, and adapters with random weights of their true shapes."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loraplex.engine.errors import ConfigError
from loraplex.entrypoints.bench.names import MODELS, SIZES

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_WEIGHT_STD = 0.02


def model_config(name: str) -> dict[str, Any]:
    """Contents of the config.json of one of MODELS."""
    return {**_LLAMA, **dict(zip(SIZES, MODELS[name], strict=True))}


def write_model(folder: Path, name: str) -> Path:
    """Write a model directory without weights, for `--load-format dummy`; returns `folder`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model_config(name)))
    return folder


def read_config(model: str) -> dict[str, Any]:
    """Contents of the config.json of a model directory.

    Raises:
        ConfigError: there is none, as for a GGUF file or the packaged model.
    """
    path = Path(model).expanduser() / "config.json"
    if not model or not path.is_file():
        raise ConfigError(
            f"random adapters need the config.json of a model directory, and "
            f"{model or 'the packaged model'} has none: give --model such a directory or one of "
            f"{', '.join(MODELS)}, or name adapters with --adapter"
        )
    return dict(json.loads(path.read_text()))


class AdapterWriter:
    """Writes PEFT directories of random adapters that differ in content.

    Every file of weights is one buffer of random bf16 numbers, rotated by its own offset, so
    writing costs little more than the disk. At most about `num_weight_files` files are written.
    Further adapters link to one of them and have another `lora_alpha`. The scale is part of an
    adapter's content hash, so they share neither pages nor host memory.
    """

    def __init__(
        self,
        config: dict[str, Any],
        *,
        ranks: Sequence[int],
        modules: Sequence[str],
        num_weight_files: int = 64,
        use_dora: bool = False,
    ) -> None:
        """Prepare the buffer. `ranks` are dealt to the adapters in turn; see names.MODULES."""
        self._use_dora = use_dora
        self._ranks = tuple(ranks)
        self._modules = tuple(modules)
        # A file has one rank, so the number of files is rounded up to a multiple of len(ranks).
        self._num_files = -(-num_weight_files // len(ranks)) * len(ranks)
        self._files: dict[int, Path] = {}  # by adapter index modulo _num_files
        self._shapes = _shapes(config)
        self._num_layers = int(config["num_hidden_layers"])
        self._headers = {rank: self._header(rank) for rank in set(ranks)}
        num_values = max(self._num_values(rank) for rank in self._headers)
        values = np.random.default_rng(0).standard_normal(num_values, dtype=np.float32)
        values *= _WEIGHT_STD
        self._buffer = (values.view(np.uint32) >> 16).astype("<u2")  # the upper half is bf16

    def num_bytes(self, index: int) -> int:
        """Size of an adapter's weights in bytes."""
        return 2 * self._num_values(self._rank(index))

    def write(self, folder: Path, index: int) -> Path:
        """Write the adapter of this number, which decides rank and content; returns `folder`."""
        folder.mkdir(parents=True)
        weights = folder.absolute() / "adapter_model.safetensors"
        round_, source = divmod(index, self._num_files)
        if source in self._files:
            # A relative link: a server opens nothing that leads out of its adapter_root.
            weights.symlink_to(os.path.relpath(self._files[source], weights.parent))
        else:
            self._write_weights(weights, source)
            self._files[source] = weights
        rank = self._rank(index)
        alpha = rank * (1 + round_ / 4096)
        settings = {
            "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none",
            "target_modules": [f"{module}_proj" for module in self._modules],
            "use_dora": self._use_dora,
        }  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        return folder

    def _write_weights(self, path: Path, source: int) -> None:
        rank = self._rank(source)
        data = self._buffer[: self._num_values(rank)]
        offset = (source * 1009) % len(data)
        header = self._headers[rank]
        with path.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.write(data[offset:].data)
            file.write(data[:offset].data)

    def _rank(self, index: int) -> int:
        return self._ranks[index % len(self._ranks)]

    def _num_values(self, rank: int) -> int:
        shapes = [self._shapes[module] for module in self._modules]
        magnitudes = sum(outputs for _, outputs in shapes) if self._use_dora else 0
        return self._num_layers * (rank * sum(map(sum, shapes)) + magnitudes)

    def _header(self, rank: int) -> bytes:
        """Header of a safetensors file: JSON, padded with spaces to a multiple of 8 bytes."""
        tensors = {}
        end = 0
        for layer in range(self._num_layers):
            for module in self._modules:
                in_features, out_features = self._shapes[module]
                block = "self_attn" if module in ("q", "k", "v", "o") else "mlp"
                prefix = f"base_model.model.model.layers.{layer}.{block}.{module}_proj"
                parts: dict[str, tuple[int, ...]] = {
                    "lora_A.weight": (rank, in_features), "lora_B.weight": (out_features, rank),
                }  # fmt: skip
                if self._use_dora:
                    parts["lora_magnitude_vector"] = (out_features,)
                for part, shape in parts.items():
                    start, end = end, end + 2 * math.prod(shape)
                    tensors[f"{prefix}.{part}"] = {
                        "dtype": "BF16", "shape": shape, "data_offsets": (start, end),
                    }  # fmt: skip
        text = json.dumps(tensors).encode()
        return text + b" " * (-len(text) % 8)


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(in_features, out_features) by name in names.MODULES."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    num_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // num_heads
    queries = num_heads * head_dim
    keys = (config.get("num_key_value_heads") or num_heads) * head_dim
    return {
        "q": (hidden, queries), "k": (hidden, keys), "v": (hidden, keys), "o": (queries, hidden),
        "gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden),
    }  # fmt: skip
