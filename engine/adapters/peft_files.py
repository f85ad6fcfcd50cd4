"""Reads and checks a PEFT directory and packs its weights in the layout of pages.

The file and the configuration must name the same modules, and both must fit the base model. An
adapter that does not is refused, because it would silently give wrong answers.
"""

import logging
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from loraplex.engine.adapters.content_hash import ContentHashCache
from loraplex.engine.adapters.open_file import NotRegularFileError, open_regular_file
from loraplex.engine.adapters.packing.block import Sides
from loraplex.engine.adapters.packing.pack import UnusableWeightsError, pack
from loraplex.engine.adapters.paths import WEIGHTS_FILE
from loraplex.engine.adapters.peft_config import (
    ALL_LINEAR,
    CONFIG_FILE,
    PeftConfig,
    PeftConfigError,
    read_peft_config,
)
from loraplex.engine.adapters.reader_error import ReaderError, is_transient
from loraplex.engine.adapters.safetensors_file import (
    DamagedFileError,
    SafetensorsFile,
    TensorPlace,
    open_safetensors,
    parse_header,
    stamp,
)
from loraplex.engine.adapters.target import AdapterTarget, ModuleKey
from loraplex.engine.errors import AdapterError
from loraplex.memory.adapter_layout import ModuleShape, SegmentName
from loraplex.memory.host.store import Allocate, PackedAdapter

logger = logging.getLogger("loraplex")

PICKLE_FILES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+?)\.(?:(?P<A>lora_A(?:\.default)?\.weight)"
    r"|(?P<B>lora_B(?:\.default)?\.weight)|(?P<lora_bias>lora_B(?:\.default)?\.bias)"
    r"|(?P<magnitude>lora_magnitude_vector(?:\.default)?(?:\.weight)?)|(?P<bias>base_layer\.bias))"
)
_SEGMENTS: dict[str, SegmentName] = {
    "A": "A", "B": "B", "magnitude": "gain", "lora_bias": "shift", "bias": "shift",
}  # fmt: skip
_OPTIONS = {"magnitude": "use_dora", "lora_bias": "lora_bias", "bias": "bias='lora_only'"}
_TEXTS = {
    "A": "no lora_A", "B": "no lora_B", "magnitude": "no magnitude, which DoRA needs",
    "lora_bias": "no bias on lora_B", "bias": "no trained bias",
}  # fmt: skip
_SPECIAL_KEYS = {
    "lora_embedding_": "LoRA on embeddings is not supported",
    "lora_A.bias": "a bias on lora_A is not supported",
    "modules_to_save": "it replaces whole modules of the base model",
}
_TRAINING_KEY = ".lora_velora_embed"  # only the backward pass reads it
_UNSUPPORTED_MODULES = ("lm_head", "model.embed_tokens")
_MAX_LISTED = 4

Parts = dict[str, TensorPlace]  # the tensors of a module, by the names in _SEGMENTS
MAX_KEPT_HEADER_BYTES = 1 << 20


def allocate_plain(num_bytes: int) -> torch.Tensor:
    """Returns new memory for one adapter."""
    return torch.empty(num_bytes, dtype=torch.uint8)


def read_adapter(
    name: str,
    folder: Path,
    target: AdapterTarget,
    *,
    allocate: Allocate = allocate_plain,
    hash_cache: ContentHashCache | None = None,
    packers: Executor | None = None,
) -> PackedAdapter:
    """Read, check, hash and pack. Only the two PEFT files of `folder` are opened.

    Args:
        allocate: returns the memory to pack into. It is called once, when everything except the
            numbers is checked.
        hash_cache: hashes of files that were read before. Unchanged files are not hashed and not
            searched for NaN again.
        packers: threads that share the work; none of them may wait for this call.

    Raises:
        AdapterError: the adapter cannot be served; the text names it and the reason.
    """
    try:
        if not folder.is_dir():
            raise PeftConfigError(f"{folder} is no directory")
        config_stamp = _stamp_config(folder, target.adapter_root)
        config = read_peft_config(folder, target.adapter_root)
        logger.debug("adapter %s was trained on %s", name, config.base_model or "an unnamed base")
        with open_safetensors(folder / WEIGHTS_FILE, target.adapter_root) as file:
            files = (file.stamp(), config_stamp)
            found = _find_modules(file, config, target)
            packed = pack(
                file,
                found,
                _scales_of(config, found, target),
                target=target,
                allocate=allocate,
                packers=packers,
                content_hash=hash_cache.get(folder, files) if hash_cache else None,
                replaces_bias=config.replaces_bias,
            )
            if (file.stamp(), _stamp_config(folder, target.adapter_root)) != files:
                raise PeftConfigError("its files changed while they were read; load it again")
        if hash_cache:
            hash_cache.remember(folder, files, packed.content_hash)
        return packed
    except OSError as error:
        if is_transient(error):
            raise ReaderError(f"the files in {folder} cannot be read now: {error}") from error
        reason = _explain(error, folder)
    except DamagedFileError as error:
        reason = f"{WEIGHTS_FILE} is damaged: {error}"
    except (PeftConfigError, NotRegularFileError, UnusableWeightsError) as error:
        reason = str(error)
    raise AdapterError(f"adapter {name!r}: {reason}")


def _scales_of(
    config: PeftConfig, found: Iterable[ModuleKey], target: AdapterTarget
) -> dict[ModuleKey, float]:
    if config.rank_pattern or config.alpha_pattern:
        return {key: config.scale_of(target.full_name(key)) for key in found}
    first = next(iter(found))  # at least one module is adapted, and all have one scale
    return dict.fromkeys(found, config.scale_of(target.full_name(first)))


def _stamp_config(folder: Path, root: str) -> tuple[int, ...]:
    try:
        with open_regular_file(folder / CONFIG_FILE, root) as descriptor:
            return stamp(os.fstat(descriptor))
    except (OSError, NotRegularFileError):
        return ()  # read_peft_config reports the error


def _find_modules(
    file: SafetensorsFile, config: PeftConfig, target: AdapterTarget
) -> Mapping[ModuleKey, Sides]:
    """Returns the tensors of each module, checked.

    Adapters of one recipe have equal headers, so check_header has most headers in its cache. That
    saves three milliseconds in which the loop that launches steps would wait.
    """
    header, num_bytes = file.read_header(), file.status.st_size
    unscaled = replace(config, alpha=1.0, alpha_pattern=(), use_rslora=False)
    check = check_header if len(header) <= MAX_KEPT_HEADER_BYTES else check_header.__wrapped__
    return check(header, num_bytes, unscaled, target)


@lru_cache(maxsize=16)
def check_header(
    header: bytes, file_bytes: int, config: PeftConfig, target: AdapterTarget
) -> Mapping[ModuleKey, Sides]:
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
    expected = _expected_modules(config, names)
    found = _group_parts(parse_header(header, file_bytes), names)
    _check_modules(expected, found, target)
    for key, parts in found.items():
        _check_parts(key, parts, config, target)
    return {
        key: {_SEGMENTS[part]: place for part, place in parts.items()}
        for key, parts in found.items()
    }


def _explain(error: OSError, folder: Path) -> str:
    if not isinstance(error, FileNotFoundError):
        return f"{WEIGHTS_FILE} cannot be read: {error}"
    for pickle_name in PICKLE_FILES:
        if (folder / pickle_name).exists():
            return (
                f"{pickle_name} is a pickle file, which may run code when read; save the adapter "
                "as safetensors"
            )
    return f"there is no {WEIGHTS_FILE} in {folder}"


def _expected_modules(config: PeftConfig, names: dict[str, ModuleKey]) -> set[ModuleKey]:
    if config.target_modules != ALL_LINEAR:
        for special in _UNSUPPORTED_MODULES:
            if config.targets(special):
                raise PeftConfigError(f"target_modules reach {special}: that is not supported")
    expected = {key for name, key in names.items() if config.targets(name)}
    if not expected:
        raise PeftConfigError("target_modules match nothing in this base model")
    return expected


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


def _check_parts(key: ModuleKey, parts: Parts, config: PeftConfig, target: AdapterTarget) -> None:
    name, module = target.full_name(key), target.modules[key[1]]
    wanted = {"A", "B"}
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
        num_axes = 2 if part in "AB" else 1
        if len(parts[part].shape) != num_axes or not parts[part].dtype.is_floating_point:
            kind = "matrix" if num_axes == 2 else "vector"
            raise PeftConfigError(f"{name}: {part} is no {kind} of floating-point numbers")
    _check_sizes(name, parts, config, target, module.full_shape)


def _check_sizes(
    name: str, parts: Parts, config: PeftConfig, target: AdapterTarget, shape: ModuleShape
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
    for part in parts.keys() - {"A", "B"}:
        if parts[part].shape[0] != shape.out_features:
            raise PeftConfigError(
                f"{name}: {part} has {parts[part].shape[0]} numbers, not {shape.out_features}"
            )
    if rank > target.max_rank:
        raise PeftConfigError(f"{name} has rank {rank}, above max_lora_rank {target.max_rank}")
