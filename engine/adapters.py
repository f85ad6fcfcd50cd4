"""Reads a PEFT directory and packs its weights in page layout; refuses what it cannot honour.

The tensors in the file say which modules exist, the configuration must agree with them, and both
must fit the base model. Everything else would answer with a wrong model, silently.
"""

import hashlib
import logging
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from loraplex.engine.errors import AdapterError
from loraplex.engine.peft_config import ALL_LINEAR, PeftConfig, PeftConfigError, read_peft_config
from loraplex.memory.adapter_layout import MODULES, ModuleShape, align, num_pages, place_layer
from loraplex.memory.host_store import PackedAdapter

logger = logging.getLogger("loraplex")

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
HEADER_BYTES = 16 << 20

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
_SPECIAL_KEYS = {
    "lora_magnitude_vector": "DoRA is not supported",
    "lora_embedding_": "LoRA on embeddings is not supported",
    "lora_A.bias": "a bias on lora_A is not supported",
    "lora_B.bias": "a bias on lora_B is not supported",
    "modules_to_save": "it replaces whole modules of the base model",
}
_UNSUPPORTED_MODULES = ("lm_head", "model.embed_tokens")
_MAX_LISTED = 4

ModuleKey = tuple[int, int]  # layer, module id
Sides = dict[str, torch.Tensor]  # "A" [rank, in_features], "B" [out_features, rank]


@dataclass(frozen=True, slots=True)
class AdapterTarget:
    """The base model on one worker, as adapters must fit it."""

    num_layers: int
    shapes: tuple[ModuleShape, ...]
    page_elems: int
    dtype: torch.dtype
    max_rank: int
    pin_memory: bool = False

    @property
    def max_file_bytes(self) -> int:
        """A file of every module at the largest rank in float64, and its header."""
        per_rank = sum(shape.in_features + shape.out_features for shape in self.shapes)
        return 8 * self.num_layers * self.max_rank * per_rank + HEADER_BYTES


def module_name(layer: int, module: int) -> str:
    """As Hugging Face names it, and as PEFT matches it."""
    parent = "self_attn" if module < MODULES.index("gate_proj") else "mlp"
    return f"model.layers.{layer}.{parent}.{MODULES[module]}"


def read_adapter(name: str, folder: Path, target: AdapterTarget) -> PackedAdapter:
    """Read, check, hash and pack. Only the two PEFT files of `folder` are opened.

    Raises:
        AdapterError: names the adapter and the reason.
    """
    try:
        if not folder.is_dir():
            raise PeftConfigError(f"{folder} is no directory")
        config = read_peft_config(folder)
        logger.debug("adapter %s was trained on %s", name, config.base_model or "an unnamed base")
        names = {
            module_name(layer, module): (layer, module)
            for layer in range(target.num_layers)
            for module in range(len(MODULES))
        }
        expected = _expected_modules(config, names)
        found = _group_sides(_read_tensors(folder, target), names)
        _check_modules(expected, found, config)
        for key, sides in found.items():
            _check_sides(key, sides, config, target)
        return _pack(found, config, target)
    except PeftConfigError as error:
        raise AdapterError(f"adapter {name!r}: {error}") from None


def _expected_modules(config: PeftConfig, names: dict[str, ModuleKey]) -> set[ModuleKey]:
    if config.target_modules != ALL_LINEAR:
        for special in _UNSUPPORTED_MODULES:
            if config.targets(special):
                raise PeftConfigError(f"target_modules reach {special}: that is not supported")
    if isinstance(config.target_modules, tuple):
        for entry in config.target_modules:
            if not any(name == entry or name.endswith(f".{entry}") for name in names):
                raise PeftConfigError(f"target module {entry!r} matches nothing in this base model")
    expected = {key for name, key in names.items() if config.targets(name)}
    if not expected:
        raise PeftConfigError("target_modules match nothing in this base model")
    return expected


def _read_tensors(folder: Path, target: AdapterTarget) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS_FILE
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise PeftConfigError(f"{WEIGHTS_FILE} is no regular file")
        if status.st_size > target.max_file_bytes:
            raise PeftConfigError(
                f"{WEIGHTS_FILE} has {status.st_size} bytes, more than any adapter of rank up to "
                f"{target.max_rank} for this base model"
            )
        # Read, not mapped: a file that someone truncates meanwhile must not end the process.
        return safetensors.torch.load(path.read_bytes())
    except FileNotFoundError:
        for pickle_name in PICKLE_FILES:
            if (folder / pickle_name).exists():
                raise PeftConfigError(
                    f"{pickle_name} is a pickle file, which may run code when read; save the "
                    "adapter as safetensors"
                ) from None
        raise PeftConfigError(f"there is no {WEIGHTS_FILE} in {folder}") from None
    except OSError as error:
        raise PeftConfigError(f"{WEIGHTS_FILE} cannot be read: {error}") from None
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, PeftConfigError):
            raise
        raise PeftConfigError(f"{WEIGHTS_FILE} is damaged: {error}") from None


def _group_sides(
    tensors: dict[str, torch.Tensor], names: dict[str, ModuleKey]
) -> dict[ModuleKey, Sides]:
    found: dict[ModuleKey, Sides] = {}
    for key, tensor in tensors.items():
        for part, reason in _SPECIAL_KEYS.items():
            if part in key:
                raise PeftConfigError(f"tensor {key}: {reason}")
        match = _KEY.fullmatch(key)
        if match is None:
            raise PeftConfigError(f"tensor {key} is no LoRA weight")
        module = names.get(match["module"])
        if module is None:
            raise PeftConfigError(f"tensor {key}: this base model has no such module to adapt")
        sides = found.setdefault(module, {})
        if match["side"] in sides:
            raise PeftConfigError(f"tensor {key} is there twice")
        sides[match["side"]] = tensor
    return found


def _check_modules(
    expected: set[ModuleKey], found: dict[ModuleKey, Sides], config: PeftConfig
) -> None:
    missing, extra = expected - set(found), set(found) - expected
    if missing:
        raise PeftConfigError(f"target_modules name {_list(missing)}, but the file has no weights")
    if extra:
        raise PeftConfigError(
            f"the file has weights of {_list(extra)}, which the config leaves out"
        )


def _list(keys: Iterable[ModuleKey]) -> str:
    texts = [module_name(*key) for key in sorted(keys)]
    more = f" and {len(texts) - _MAX_LISTED} more" if len(texts) > _MAX_LISTED else ""
    return ", ".join(texts[:_MAX_LISTED]) + more


def _check_sides(key: ModuleKey, sides: Sides, config: PeftConfig, target: AdapterTarget) -> None:
    name, shape = module_name(*key), target.shapes[key[1]]
    for side in "AB":
        if side not in sides:
            raise PeftConfigError(f"{name} has no lora_{side}")
        if sides[side].ndim != 2 or not sides[side].is_floating_point():
            raise PeftConfigError(f"{name}.lora_{side} is no matrix of floating-point numbers")
    a, b, rank = sides["A"], sides["B"], config.rank_of(name)
    if a.shape[1] != shape.in_features or b.shape[0] != shape.out_features:
        trained_on = f" ({config.base_model})" if config.base_model else ""
        raise PeftConfigError(
            f"{name} is {a.shape[1]} -> {b.shape[0]} in the adapter and {shape.in_features} -> "
            f"{shape.out_features} in this base model: it was trained on another base{trained_on}"
        )
    if a.shape[0] != rank or b.shape[1] != rank:
        raise PeftConfigError(
            f"{name} has rank {a.shape[0]} in lora_A and {b.shape[1]} in lora_B, "
            f"but {rank} in the config"
        )
    if rank > target.max_rank:
        raise PeftConfigError(f"{name} has rank {rank}, above max_lora_rank {target.max_rank}")


def _pack(
    found: dict[ModuleKey, Sides], config: PeftConfig, target: AdapterTarget
) -> PackedAdapter:
    shape = (target.num_layers, len(MODULES))
    rank, a_start, b_start = (torch.zeros(shape, dtype=torch.int32) for _ in range(3))
    scale = torch.zeros(shape)
    for key in found:
        rank[key] = found[key]["A"].shape[0]
        scale[key] = config.scale_of(module_name(*key))
    layer_ranks = [
        {module: int(r) for module, r in enumerate(row) if r} for row in rank.tolist()
    ]  # fmt: skip
    count = num_pages(layer_ranks, target.shapes, target.page_elems)
    data = torch.zeros(
        target.num_layers,
        count * target.page_elems,
        dtype=target.dtype,
        pin_memory=target.pin_memory,
    )
    digest = hashlib.blake2b(digest_size=32)
    digest.update(f"{target.dtype} {shape}".encode())
    digest.update(rank.numpy().tobytes() + scale.numpy().tobytes())
    for layer, ranks in enumerate(layer_ranks):
        places, used = place_layer(ranks, target.shapes)
        for module, place in places.items():
            sides = found[layer, module]
            _write_rows(data[layer], place.a_start, sides["A"])
            _write_rows(data[layer], place.b_start, sides["B"].T)
            a_start[layer, module], b_start[layer, module] = place.a_start, place.b_start
        weights = data[layer, :used]
        if not bool(torch.isfinite(weights).all()):
            raise PeftConfigError(
                f"layer {layer} holds NaN or infinite values, or some that {target.dtype} cannot"
            )
        digest.update(weights.view(torch.uint8).numpy().data)
    return PackedAdapter(digest.hexdigest(), count, data, rank, a_start, b_start, scale)


def _write_rows(layer: torch.Tensor, start: int, rows: torch.Tensor) -> None:
    count, width = rows.shape
    stride = align(width)
    layer[start : start + count * stride].view(count, stride)[:, :width].copy_(rows)
