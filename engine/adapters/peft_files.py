"""Reads and checks a PEFT directory and packs its weights in the layout of pages.

The file and the configuration must name the same modules, and both must fit the base model. An
adapter that does not is refused, because it would silently give wrong answers.
"""

import logging
import os
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

import torch

from loraplex.engine.adapters.content_hash import ContentHashCache
from loraplex.engine.adapters.header.peft_tensors import AdapterTensors, check_header
from loraplex.engine.adapters.open_file import NotRegularFileError, open_regular_file, root_of
from loraplex.engine.adapters.packing.pack import AdapterContent, UnusableWeightsError, pack
from loraplex.engine.adapters.paths import WEIGHTS_FILE
from loraplex.engine.adapters.peft_config import (
    CONFIG_FILE,
    PeftConfig,
    PeftConfigError,
    read_peft_config,
)
from loraplex.engine.adapters.reader_error import ReaderError, is_transient
from loraplex.engine.adapters.safetensors_file import (
    DamagedFileError,
    SafetensorsFile,
    open_safetensors,
    stamp,
)
from loraplex.engine.adapters.target import AdapterTarget, ModuleKey
from loraplex.engine.adapters.tensors.memory_folder import is_memory_folder
from loraplex.engine.adapters.vocabulary.content import (
    UnusableRowsError,
    VocabularyContent,
    read_vocabulary,
)
from loraplex.engine.errors import AdapterError
from loraplex.memory.host.store import Allocate, PackedAdapter

logger = logging.getLogger("loraplex")

PICKLE_FILES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")

MAX_KEPT_HEADER_BYTES = 1 << 20

_REFUSALS = (PeftConfigError, NotRegularFileError, UnusableWeightsError, UnusableRowsError)


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
        if not (is_memory_folder(folder) or folder.is_dir()):
            raise PeftConfigError(f"{folder} is no directory")
        root = root_of(folder, target.adapter_roots)
        config_stamp = _stamp_config(folder, root)
        config = read_peft_config(folder, root)
        logger.debug("adapter %s was trained on %s", name, config.base_model or "an unnamed base")
        with open_safetensors(folder / WEIGHTS_FILE, root) as file:
            files = (file.stamp(), config_stamp)
            found = _find_tensors(file, config, target)
            packed = pack(
                file,
                AdapterContent(
                    layers=found.layers,
                    scales=_scales_of(config, found.names),
                    replaces_bias=config.replaces_bias,
                    vocabulary=_read_vocabulary(file, found, config, target),
                ),
                target=target,
                allocate=allocate,
                packers=packers,
                content_hash=hash_cache.get(folder, files) if hash_cache else None,
            )
            if (file.stamp(), _stamp_config(folder, root)) != files:
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
    except _REFUSALS as error:
        reason = str(error)
    raise AdapterError(f"adapter {name!r}: {reason}")


def _scales_of(config: PeftConfig, names: Mapping[ModuleKey, str]) -> dict[ModuleKey, float]:
    if config.rank_pattern or config.alpha_pattern:
        return {key: config.scale_of(name) for key, name in names.items()}
    if not names:
        return {}
    first = next(iter(names.values()))  # all modules have one scale
    return dict.fromkeys(names, config.scale_of(first))


def _read_vocabulary(
    file: SafetensorsFile, found: AdapterTensors, config: PeftConfig, target: AdapterTarget
) -> VocabularyContent | None:
    if found.vocabulary is None:
        return None
    matrices = (found.vocabulary.embedding, found.vocabulary.head)
    scales = {matrix.name: config.scale_of(matrix.name) for matrix in matrices if matrix.rank}
    return read_vocabulary(file, found.vocabulary, scales, target)


def _stamp_config(folder: Path, root: str) -> tuple[int, ...]:
    try:
        with open_regular_file(folder / CONFIG_FILE, root) as descriptor:
            return stamp(os.fstat(descriptor))
    except (OSError, NotRegularFileError):
        return ()  # read_peft_config reports the error


def _find_tensors(
    file: SafetensorsFile, config: PeftConfig, target: AdapterTarget
) -> AdapterTensors:
    """Returns the tensors of the adapter, checked.

    Adapters of one recipe have equal headers, so check_header has most headers in its cache. That
    saves three milliseconds in which the loop that launches steps would wait.
    """
    header, num_bytes = file.read_header(), file.status.st_size
    unscaled = replace(config, alpha=1.0, alpha_pattern=(), use_rslora=False)
    check = check_header if len(header) <= MAX_KEPT_HEADER_BYTES else check_header.__wrapped__
    return check(header, num_bytes, unscaled, target)


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
