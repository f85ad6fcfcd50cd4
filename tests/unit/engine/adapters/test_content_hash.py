"""The content hash: equal for equal tensors and scales, whatever reads them."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from loraplex.engine.adapters.peft_files import WEIGHTS_FILE, read_adapter
from loraplex.engine.adapters.target import AdapterTarget

from helpers.models.peft_adapters import make_adapter
from helpers.models.peft_folders import (
    CONFIG_FILE,
    Q0,
    edit_config,
    edit_weights,
    make_target,
)


def test_hash_is_of_the_content(folder: Path, hf_model: PreTrainedModel, tmp_path: Path) -> None:
    def hashed(path: Path, **overrides: Any) -> str:
        return read_adapter("any", path, make_target(**overrides)).content_hash

    options: dict[str, Any] = {"r": 4, "alpha": 8, "targets": ["q_proj", "down_proj"]}
    first = hashed(folder)
    same = make_adapter(hf_model, tmp_path / "same", **options)
    assert hashed(same) == first
    assert hashed(folder, page_elems=64) == first
    edit_config(same, base_model_name_or_path="elsewhere", lora_dropout=0.3)
    assert hashed(same) == first
    edit_weights(same, lambda t: t.update({  # PEFT's names with the adapter's name in them
        key.replace(".weight", ".default.weight"): t.pop(key) for key in list(t)
    }))  # fmt: skip
    assert hashed(same) == first
    edit_config(same, lora_alpha=9)
    assert hashed(same) != first
    edit_config(same, lora_alpha=8, use_rslora=True)
    assert hashed(same) != first
    edit_config(same, use_rslora=False)
    edit_weights(same, lambda t: t[Q0.format("B").replace(".weight", ".default.weight")].add_(1e-3))
    assert hashed(same) != first
    other = make_adapter(hf_model, tmp_path / "other", **options, seed=1)
    assert hashed(other) != first


def sliced(target: AdapterTarget) -> AdapterTarget:
    """A target that reads the same adapter and packs something else: other pages and padding."""
    return replace(target, page_elems=target.page_elems // 4, max_rank=4)


def test_hash_is_equal_for_all_dtypes_and_layouts(folder: Path) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    targets = [make_target(dtype=dtype) for dtype in dtypes]
    targets += [sliced(target) for target in targets]
    packed = [read_adapter("any", folder, target) for target in targets]
    assert len({one.content_hash for one in packed}) == 1
    assert len({one.data.view(torch.uint8).numpy().tobytes() for one in packed}) > 2


def test_hash_needs_no_order_in_the_file(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "reordered"
    other.mkdir()
    (other / CONFIG_FILE).write_bytes((folder / CONFIG_FILE).read_bytes())
    tensors = load_file(folder / WEIGHTS_FILE)
    data, header, end = [], {}, 0
    for key in sorted(tensors, reverse=True):  # the safetensors library sorts by itself
        raw = tensors[key].numpy().tobytes()
        entry = {"dtype": "F32", "shape": list(tensors[key].shape)}
        header[key] = {**entry, "data_offsets": [end, end + len(raw)]}
        data.append(raw)
        end += len(raw)
    text = json.dumps({"__metadata__": {"format": "pt", "by": "hand"}, **header}).encode()
    raw_file = len(text).to_bytes(8, "little") + text + b"".join(data)
    assert raw_file != (folder / WEIGHTS_FILE).read_bytes()
    (other / WEIGHTS_FILE).write_bytes(raw_file)
    target = make_target()
    first, second = (read_adapter("any", path, target) for path in (folder, other))
    assert first.content_hash == second.content_hash
    assert torch.equal(first.data, second.data)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_hash_is_what_its_definition_says(
    hf_model: PreTrainedModel, tmp_path: Path, num_threads: int
) -> None:
    """Computed here from the file as the safetensors library reads it."""
    folder = make_adapter(
        hf_model, tmp_path / "adapter", r=4, alpha=8, targets=["q_proj", "down_proj", "k_proj"],
        rank_pattern={"down_proj": 2}, alpha_pattern={"k_proj": 3},
    )  # fmt: skip
    tensors = load_file(folder / WEIGHTS_FILE)
    root = hashlib.sha256(b"loraplex adapter 2\n")
    for layer in range(3):
        lines, data = "", b""
        for name, parent, rank, scale in (
            ("down_proj", "mlp", 2, 4.0), ("k_proj", "self_attn", 4, 0.75),
            ("q_proj", "self_attn", 4, 2.0),
        ):  # fmt: skip
            key = f"base_model.model.model.layers.{layer}.{parent}.{name}.lora_{{}}.weight"
            a, b = tensors[key.format("A")], tensors[key.format("B")]
            assert a.shape[0] == rank
            sides = f"{a.dtype} {list(a.shape)} {b.dtype} {list(b.shape)}"
            lines += f"{layer} {name} {scale.hex()} {sides}\n"
            data += a.numpy().tobytes() + b.numpy().tobytes()
        root.update(hashlib.sha256(lines.encode() + data).digest())
    with ThreadPoolExecutor(num_threads) as packers:
        packed = read_adapter("any", folder, make_target(), packers=packers)
    assert packed.content_hash == root.hexdigest()


@pytest.mark.parametrize("pair", [("q_proj", "o_proj"), ("gate_proj", "up_proj")])
def test_hash_changes_when_modules_are_swapped(
    hf_model: PreTrainedModel, tmp_path: Path, pair: tuple[str, str]
) -> None:
    folder = make_adapter(hf_model, tmp_path / "adapter", r=4, alpha=8, targets=list(pair))
    before = read_adapter("any", folder, make_target()).content_hash

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if pair[0] in key]:
            other = key.replace(*pair)
            tensors[key], tensors[other] = tensors[other], tensors[key]

    edit_weights(folder, swap)
    assert read_adapter("any", folder, make_target()).content_hash != before


def test_hash_is_of_the_dtype_in_the_file(folder: Path) -> None:
    edit_weights(folder, lambda t: t.update({key: t[key].bfloat16() for key in t}))
    narrow = read_adapter("any", folder, make_target())
    edit_weights(folder, lambda t: t.update({key: t[key].float() for key in t}))
    wide = read_adapter("any", folder, make_target())
    assert torch.equal(narrow.data, wide.data) and narrow.content_hash != wide.content_hash
