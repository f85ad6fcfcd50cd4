"""Packing of adapters, and the cache of content hashes."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.engine.adapters import content_hash
from loraplex.engine.adapters import peft_files as adapters
from loraplex.engine.adapters.content_hash import ContentHashCache
from loraplex.engine.adapters.packing import pack as adapter_packing
from loraplex.engine.adapters.peft_config import CONFIG_FILE
from loraplex.engine.adapters.peft_files import WEIGHTS_FILE, read_adapter
from loraplex.engine.adapters.target import AdapterTarget
from loraplex.engine.errors import AdapterError
from loraplex.engine.model.modules import llama_modules
from loraplex.engine.model.shard import whole_modules
from loraplex.memory.adapter_layout import ModuleShape
from loraplex.memory.host.store import PackedAdapter

from helpers.models.dummy_models import write_adapter

ODD = {"hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 3,
       "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
SHAPES = tuple(
    ModuleShape(*pair)
    for pair in ((72, 72), (72, 36), (72, 36), (72, 72), (72, 100), (72, 100), (100, 72))
)


def make_target() -> AdapterTarget:
    return AdapterTarget(
        3, whole_modules(SHAPES), page_elems=1024, dtype=torch.bfloat16, max_rank=8
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Widths that are no multiples of a row's alignment."""
    return write_adapter(tmp_path / "adapter", ODD, rank=4, seed=0)


def edit_weights(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({key: change(key, value) for key, value in tensors.items()}, folder / WEIGHTS_FILE)


class CountingHash:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, sha256 = 0, hashlib.sha256

        def counting(*args: Any) -> Any:
            self.count += 1
            return sha256(*args)

        monkeypatch.setattr(hashlib, "sha256", counting)


def test_a_known_file_is_not_hashed_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter, hashes = CountingHash(monkeypatch), ContentHashCache()
    first = read_adapter("a", folder, make_target(), hash_cache=hashes)
    assert counter.count == 4  # three layers and the root
    read_adapter("a", folder, make_target(), hash_cache=hashes)
    assert counter.count == 8  # written a moment ago: not remembered
    monkeypatch.setattr(content_hash, "SETTLE_S", 0.0)
    read_adapter("a", folder, make_target(), hash_cache=hashes)
    assert counter.count == 12
    again = read_adapter("a", folder, make_target(), hash_cache=hashes)
    assert counter.count == 12
    assert again.content_hash == first.content_hash and torch.equal(again.data, first.data)


def test_one_recipe_is_checked_once(folder: Path, tmp_path: Path) -> None:
    """Whatever the numbers and the scale; another rank, target or base model is another recipe."""
    adapters.check_header.cache_clear()
    other = write_adapter(tmp_path / "other", ODD, rank=4, seed=1)
    settings = json.loads((other / CONFIG_FILE).read_text())
    first = read_adapter("a", folder, make_target())

    def configure(**changes: Any) -> None:
        (other / CONFIG_FILE).write_text(json.dumps({**settings, **changes}))

    configure(lora_alpha=12, use_rslora=True)
    second = read_adapter("b", other, make_target())
    assert adapters.check_header.cache_info()[:2] == (1, 1)  # hits, misses
    check_layout(second, other)
    assert float(first.scale[0, 0]) == 1.0 and float(second.scale[0, 0]) == 6.0
    for changes, reason in (
        ({"r": 5}, "but 5 in the config"),
        ({"target_modules": ["q_proj"]}, "which the config leaves out"),
    ):
        configure(**changes)
        for _ in range(2):
            with pytest.raises(AdapterError, match=reason):
                read_adapter("b", other, make_target())
    configure()
    with pytest.raises(AdapterError, match="above max_lora_rank 3"):
        read_adapter("b", other, replace(make_target(), max_rank=3))


def test_a_long_header_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters.check_header.cache_clear()
    monkeypatch.setattr(adapters, "MAX_KEPT_HEADER_BYTES", 100)
    check_layout(read_adapter("a", folder, make_target()), folder)
    assert adapters.check_header.cache_info().currsize == 0


@pytest.mark.parametrize("change", ["weights", "replaced", "alpha"])
def test_a_changed_file_is_hashed_again(
    folder: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if its size stays and its mtime is set back."""
    monkeypatch.setattr(content_hash, "SETTLE_S", 0.0)
    hashes = ContentHashCache()
    before = read_adapter("a", folder, make_target(), hash_cache=hashes)
    path = folder / (CONFIG_FILE if change == "alpha" else WEIGHTS_FILE)
    times = path.stat()
    data = path.read_bytes()
    if change == "alpha":
        path.write_text(path.read_text().replace('"lora_alpha": 4', '"lora_alpha": 9'))
    else:
        if change == "replaced":
            path.unlink()
        with path.open("r+b" if path.exists() else "wb") as file:
            file.write(data[:-4] + b"\0\0\0\x3f")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == len(data) and path.stat().st_mtime_ns == times.st_mtime_ns
    after = read_adapter("a", folder, make_target(), hash_cache=hashes)
    assert after.content_hash != before.content_hash
    assert read_adapter("a", folder, make_target()).content_hash == after.content_hash


def test_a_file_that_changes_while_it_is_read(folder: Path) -> None:
    path = folder / WEIGHTS_FILE

    def allocate(num_bytes: int) -> torch.Tensor:
        path.write_bytes(path.read_bytes())
        return torch.empty(num_bytes, dtype=torch.uint8)

    with pytest.raises(AdapterError, match="changed while they were read; load it again"):
        read_adapter("a", folder, make_target(), allocate=allocate)


@pytest.mark.parametrize("num_threads", [None, 1, 3])
@pytest.mark.parametrize("file_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_packed_into_dirty_memory(
    folder: Path, file_dtype: torch.dtype, num_threads: int | None
) -> None:
    """Element by element, against the layout's own definition; all else is zero."""
    edit_weights(folder, lambda key, tensor: tensor.to(file_dtype))
    target = make_target()
    packers = ThreadPoolExecutor(num_threads) if num_threads else None
    packed = read_adapter("a", folder, target, allocate=dirty, packers=packers)
    assert packed.content_hash == read_adapter("b", folder, target).content_hash
    check_layout(packed, folder)


@pytest.mark.parametrize("block_bytes", [1, 12_000, 1 << 20])
@pytest.mark.parametrize("change", ["none", "rank", "dtype", "absent"])
def test_blocks_are_of_layers_that_are_alike(
    tmp_path: Path, block_bytes: int, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer 3 of seven differs; half of the widths need no padding."""
    config = {**ODD, "hidden_size": 64, "num_hidden_layers": 7}
    folder, key = write_adapter(tmp_path / "adapter", config, rank=4, seed=0), "layers.3.self_attn"

    def edit(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if key not in name or change == "none":
            return tensor
        if change == "dtype":
            return tensor.to(torch.float32)
        return tensor[:2] if "lora_A" in name else tensor[:, :2].contiguous()

    if change == "absent":
        tensors = load_file(folder / WEIGHTS_FILE)
        kept = {name: tensor for name, tensor in tensors.items() if "layers.3." not in name}
        save_file(kept, folder / WEIGHTS_FILE)
    else:
        edit_weights(folder, edit)
    settings = json.loads((folder / CONFIG_FILE).read_text())
    if change == "rank":
        settings["rank_pattern"] = {rf".*{key}\..*": 2}
    if change == "absent":
        settings["layers_to_transform"] = [0, 1, 2, 4, 5, 6]
    (folder / CONFIG_FILE).write_text(json.dumps(settings))
    monkeypatch.setattr(adapter_packing, "BLOCK_BYTES", block_bytes)
    shapes = tuple(
        ModuleShape(*pair)
        for pair in ((64, 64), (64, 32), (64, 32), (64, 64), (64, 100), (64, 100), (100, 64))
    )
    target = AdapterTarget(
        7, whole_modules(shapes), page_elems=1024, dtype=torch.bfloat16, max_rank=8
    )
    check_layout(read_adapter("a", folder, target, allocate=dirty), folder)


def dirty(num_bytes: int) -> torch.Tensor:
    return torch.full((num_bytes,), 0xFF, dtype=torch.uint8)


def check_layout(packed: PackedAdapter, folder: Path) -> None:
    want = torch.zeros_like(packed.data)
    for key, tensor in load_file(folder / WEIGHTS_FILE).items():
        layer, name = int(key.split(".")[4]), key.split(".")[6]
        module = [spec.name for spec in llama_modules()].index(name)
        rows = tensor if "lora_A" in key else tensor.T
        starts = packed.a_start if "lora_A" in key else packed.b_start
        stride = -(-rows.shape[1] // 64) * 64
        for index, row in enumerate(rows):
            at = int(starts[layer, module]) + index * stride
            want[layer, at : at + len(row)] = row.to(torch.bfloat16)
    assert torch.equal(packed.data, want) and bool(want.any())


def test_a_bad_layer_among_threads(folder: Path) -> None:
    """No thread writes to the memory once the error is raised."""
    edit_weights(
        folder, lambda key, tensor: tensor * math.nan if "layers.1.self_attn" in key else tensor
    )
    with (
        ThreadPoolExecutor(3) as packers,
        pytest.raises(AdapterError, match="layer 1 holds NaN"),
    ):
        read_adapter("a", folder, make_target(), packers=packers)
