"""Finds the tensors of an adapter's layers in the header of its file, and checks them.

The file and the configuration must name the same modules, and both must fit the base model. An
adapter that does not is refused, because it would silently give wrong answers.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from loraplex.engine.adapters.header.fused_modules import FusedModules
from loraplex.engine.adapters.packing.block import SideName, Sides
from loraplex.engine.adapters.paths import WEIGHTS_FILE
from loraplex.engine.adapters.peft_config import PeftConfig, PeftConfigError
from loraplex.engine.adapters.safetensors_file import TensorPlace, parse_header
from loraplex.engine.adapters.target import AdapterTarget, ModuleKey
from loraplex.engine.adapters.vocabulary.tensors import (
    VocabularyTensors,
    check_vocabulary,
    split_tensors,
)
from loraplex.engine.model.shard import ModuleShard
from loraplex.memory.adapter_layout import ModuleShape

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+?)\.(?:(?P<A>lora_A(?:\.default)?\.weight)"
    r"|(?P<B>lora_B(?:\.default)?\.weight)|(?P<lora_bias>lora_B(?:\.default)?\.bias)"
    r"|(?P<A_scale>lora_A(?:\.default)?\.weight_scale)"
    r"|(?P<B_scale>lora_B(?:\.default)?\.weight_scale)"
    r"|(?P<magnitude>lora_magnitude_vector(?:\.default)?(?:\.weight)?)|(?P<bias>base_layer\.bias))"
)
_SEGMENTS: dict[str, SideName] = {
    "A": "A", "B": "B", "magnitude": "gain", "lora_bias": "shift", "bias": "shift",
    "A_scale": "A_scale", "B_scale": "B_scale",
}  # fmt: skip
_OPTIONS = {"magnitude": "use_dora", "lora_bias": "lora_bias", "bias": "bias='lora_only'"}
_TEXTS = {
    "A": "no lora_A", "B": "no lora_B", "magnitude": "no magnitude, which DoRA needs",
    "lora_bias": "no bias on lora_B", "bias": "no trained bias",
}  # fmt: skip
_SPECIAL_KEYS = {
    "lora_A.bias": "a bias on lora_A is not supported",
    "modules_to_save": "it replaces whole modules of the base model",
}
_TRAINING_KEY = ".lora_velora_embed"  # only the backward pass reads it
_SCALED = {"A_scale": "A", "B_scale": "B"}  # what they are scales of
_MAX_LISTED = 4

Parts = dict[str, TensorPlace]  # the tensors of a module, by the names in _SEGMENTS


@dataclass(frozen=True, slots=True)
class AdapterTensors:
    """The tensors of an adapter, checked.

    Attributes:
        layers: of the modules of layers.
        names: by which PEFT's options know these modules.
        vocabulary: of the embedding and the head; None: the adapter leaves them alone.
    """

    layers: Mapping[ModuleKey, Sides]
    names: Mapping[ModuleKey, str]
    vocabulary: VocabularyTensors | None = None


@lru_cache(maxsize=16)
def check_header(
    header: bytes, file_bytes: int, config: PeftConfig, target: AdapterTarget
) -> AdapterTensors:
    """Returns the tensors of each module. Raises PeftConfigError or DamagedFileError unless they
    agree with the configuration and the base model. The scale is not checked."""
    if file_bytes > target.max_file_bytes:
        raise PeftConfigError(
            f"{WEIGHTS_FILE} has {file_bytes} bytes, more than any adapter of rank up to "
            f"{target.max_rank} for this base model"
        )
    names = {
        target.full_name((layer, module)): (layer, module)
        for layer in range(target.num_layers)
        for module in range(len(target.modules))
    }
    of_layers, of_vocabulary = split_tensors(parse_header(header, file_bytes))
    vocabulary = check_vocabulary(of_vocabulary, config, target)
    fused = FusedModules(target)
    of_layers, origins = fused.split(of_layers)
    expected = {key for name, key in names.items() if config.targets(name)}
    expected |= {key for name, keys in fused.keys.items() if config.targets(name) for key in keys}
    if not expected and vocabulary is None:
        raise PeftConfigError("target_modules match nothing in this base model")
    found = _group_parts(of_layers, names)
    _check_modules(expected, found, target)
    known_as = {key: origins.get(key) or target.full_name(key) for key in found}
    for key, parts in found.items():
        _check_parts(known_as[key], target.modules[key[1]], parts, config, target.max_rank)
    sides = {
        key: {_SEGMENTS[part]: place for part, place in parts.items()}
        for key, parts in found.items()
    }
    return AdapterTensors(sides, known_as, vocabulary)


def _group_parts(
    tensors: dict[str, TensorPlace], names: dict[str, ModuleKey]
) -> dict[ModuleKey, Parts]:
    found: dict[ModuleKey, Parts] = {}
    for key, place in tensors.items():
        if _TRAINING_KEY in key:
            continue
        match = _KEY.fullmatch(key)
        if match is None:
            reasons = [f": {reason}" for part, reason in _SPECIAL_KEYS.items() if part in key]
            raise PeftConfigError(f"tensor {key}{(reasons or [' is no LoRA weight'])[0]}")
        module = names.get(match["module"])
        if module is None:
            raise PeftConfigError(
                f"tensor {key}: this base model has no such module to adapt; was the adapter "
                "trained on another one? base_model_name_or_path in adapter_config.json names it"
            )
        part = match.lastgroup
        assert part is not None
        parts = found.setdefault(module, {})
        if part in parts:
            raise PeftConfigError(f"tensor {key} is there twice")
        parts[part] = place
    return found


def _check_modules(
    expected: set[ModuleKey], found: dict[ModuleKey, Parts], target: AdapterTarget
) -> None:
    missing, extra = expected - set(found), set(found) - expected
    if missing:
        raise PeftConfigError(
            f"target_modules name {_list(missing, target)}, but the file has no weights"
        )
    if extra:
        raise PeftConfigError(
            f"the file has weights of {_list(extra, target)}, which the config leaves out"
        )


def _list(keys: Iterable[ModuleKey], target: AdapterTarget) -> str:
    texts = [target.full_name(key) for key in sorted(keys)]
    more = f" and {len(texts) - _MAX_LISTED} more" if len(texts) > _MAX_LISTED else ""
    return ", ".join(texts[:_MAX_LISTED]) + more


def _check_parts(
    name: str, module: ModuleShard, parts: Parts, config: PeftConfig, max_rank: int
) -> None:
    wanted = {"A", "B"}
    wanted |= _check_scales(name, parts)
    wanted |= {"magnitude"} if config.use_dora else set()
    wanted |= {"lora_bias"} if config.lora_bias else set()
    wanted |= {"bias"} if config.replaces_bias and module.spec.has_bias else set()
    for part in sorted(parts.keys() | wanted):
        if part not in parts:
            raise PeftConfigError(f"{name} has {_TEXTS[part]}")
        if part not in wanted:
            raise PeftConfigError(
                f"{name} has {_TEXTS[part].replace('no ', 'a ', 1)}, but the config does not say "
                f"{_OPTIONS[part]}"
            )
        if part in _SCALED:
            continue
        num_axes = 2 if part in "AB" else 1
        if len(parts[part].shape) != num_axes or not parts[part].dtype.is_floating_point:
            kind = "matrix" if num_axes == 2 else "vector"
            raise PeftConfigError(f"{name}: {part} is no {kind} of floating-point numbers")
    _check_sizes(name, parts, config, module.full_shape, max_rank)


def _check_scales(name: str, parts: Parts) -> set[str]:
    """Returns the scales that the module has."""
    found = parts.keys() & _SCALED.keys()
    for part in found:
        matrix, scale = parts.get(_SCALED[part]), parts[part]
        num_rows = matrix.shape[0] if matrix is not None and matrix.shape else 0
        fits = scale.shape in ((), (1,), (num_rows,), (num_rows, 1))
        if not fits or not scale.dtype.is_floating_point:
            raise PeftConfigError(
                f"{name}: the weight_scale of lora_{_SCALED[part]} is neither one floating-point "
                "number nor one for each row"
            )
    return found


def _check_sizes(
    name: str, parts: Parts, config: PeftConfig, shape: ModuleShape, max_rank: int
) -> None:
    a, b, rank = parts["A"], parts["B"], config.rank_of(name)
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
    for part in parts.keys() - {"A", "B"} - _SCALED.keys():
        if parts[part].shape[0] != shape.out_features:
            raise PeftConfigError(
                f"{name}: {part} has {parts[part].shape[0]} numbers, not {shape.out_features}"
            )
    if rank > max_rank:
        raise PeftConfigError(f"{name} has rank {rank}, above max_lora_rank {max_rank}")
