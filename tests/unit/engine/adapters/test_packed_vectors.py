"""Magnitudes and biases in the layout of pages, and in the content hash."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from loraplex.engine.adapters.peft_files import WEIGHTS_FILE, read_adapter
from loraplex.engine.adapters.reader import ProcessReader
from loraplex.engine.model.shard import ModuleShard, Piece, whole_modules
from loraplex.memory.host.slab import shared_slab
from loraplex.memory.host.store import PackedAdapter

from helpers.models.peft_adapters import make_adapter
from helpers.models.peft_folders import SHAPES, edit_weights, make_target

KEY = "base_model.model.model.layers.{}.{}.{}"
WIDTH = {"q_proj": 64, "down_proj": 64, "k_proj": 32}
MODULE = {"q_proj": 0, "k_proj": 1, "down_proj": 6}


def make(model: PreTrainedModel, path: Path, **options: Any) -> Path:
    return make_adapter(
        model, path, r=4, alpha=12, targets=["q_proj", "k_proj", "down_proj"], **options
    )


def vector(packed: PackedAdapter, starts: torch.Tensor, layer: int, name: str) -> torch.Tensor:
    """The sum of a vector's two rows, in float64."""
    start, width = int(starts[layer, MODULE[name]]), WIDTH[name]
    assert start > 0 and start % 64 == 0
    row = packed.data[layer].double()
    return row[start : start + width] + row[start + 64 : start + 64 + width]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_vector_is_precise_to_16_bits(
    hf_model: PreTrainedModel, tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = make(hf_model, tmp_path / "dora", use_dora=True)
    packed = read_adapter("a", folder, make_target(dtype=dtype))
    tensors = load_file(folder / WEIGHTS_FILE)
    assert packed.data.isfinite().all() and not packed.shift_start.any()
    for layer in range(3):
        for name in MODULE:
            parent = "mlp" if name == "down_proj" else "self_attn"
            want = tensors[KEY.format(layer, parent, name) + ".lora_magnitude_vector"].double()
            got = vector(packed, packed.gain_start, layer, name)
            torch.testing.assert_close(got, want, rtol=2**-16, atol=1e-7)
    others = [module for module in range(7) if module not in MODULE.values()]
    assert not packed.gain_start[:, others].any()


def test_a_bias_of_lora_b_carries_the_scale(hf_model: PreTrainedModel, tmp_path: Path) -> None:
    folder = make(hf_model, tmp_path / "bias", lora_bias=True)
    packed = read_adapter("a", folder, make_target())
    tensors = load_file(folder / WEIGHTS_FILE)
    assert not packed.gain_start.any() and not packed.replaces_bias
    want = 3 * tensors[KEY.format(1, "self_attn", "k_proj") + ".lora_B.bias"]
    got = vector(packed, packed.shift_start, 1, "k_proj").float()
    torch.testing.assert_close(got, want)


def test_a_rank_has_its_piece_and_adds_no_bias_twice(
    hf_model: PreTrainedModel, tmp_path: Path
) -> None:
    folder = make(hf_model, tmp_path / "bias", lora_bias=True)
    modules = list(whole_modules(SHAPES))
    half = Piece(32, 64, 32, 64)
    modules[0] = ModuleShard(modules[0].spec, modules[0].inputs, half)
    down = modules[6]
    modules[6] = ModuleShard(down.spec, Piece(80, 160, 80, 160), down.outputs)
    packed = read_adapter("a", folder, make_target(modules=tuple(modules)))
    tensors = load_file(folder / WEIGHTS_FILE)
    start = int(packed.shift_start[2, 0])
    want = 3 * tensors[KEY.format(2, "self_attn", "q_proj") + ".lora_B.bias"][32:]
    torch.testing.assert_close(packed.data[2, start : start + 32], want)
    assert not vector(packed, packed.shift_start, 2, "down_proj").any()


def test_the_hash_knows_magnitudes_and_kinds_of_biases(
    hf_model: PreTrainedModel, tmp_path: Path
) -> None:
    folder = make(hf_model, tmp_path / "dora", use_dora=True)
    before = read_adapter("a", folder, make_target()).content_hash
    assert read_adapter("a", folder, make_target(dtype=torch.bfloat16)).content_hash == before
    name = KEY.format(0, "mlp", "down_proj") + ".lora_magnitude_vector"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][5] *= 1.5

    edit_weights(folder, change)
    assert read_adapter("a", folder, make_target()).content_hash != before


def test_the_process_that_reads_knows_the_modules(
    hf_model: PreTrainedModel, tmp_path: Path
) -> None:
    """A base with biases gets room for shifts beside the gains of DoRA."""
    folder = make(hf_model, tmp_path / "dora", use_dora=True)
    biased = tuple(
        replace(module, spec=replace(module.spec, has_bias=True))
        for module in whole_modules(SHAPES)
    )
    target = make_target(modules=biased)
    want = read_adapter("a", folder, target)
    reader = ProcessReader(target)
    try:
        got = reader.read("a", folder, lambda n: shared_slab(n, page_locked=False)[:n])
    finally:
        reader.close()
    assert want.kind == got.kind == "dora" and want.shift_start.any()
    for name in ("data", "rank", "a_start", "b_start", "gain_start", "shift_start", "scale"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert (got.content_hash, got.replaces_bias) == (want.content_hash, want.replaces_bias)


def test_fp8_files_are_read(hf_model: PreTrainedModel, tmp_path: Path) -> None:
    folder = make(hf_model, tmp_path / "fp8")
    rounded: dict[str, torch.Tensor] = {}

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            rounded[name] = tensors[name].float()

    edit_weights(folder, change)
    packed = read_adapter("a", folder, make_target())
    a = rounded[KEY.format(0, "self_attn", "q_proj") + ".lora_A.weight"]
    start = int(packed.a_start[0, 0])
    assert torch.equal(packed.data[0, start : start + a.numel()].view_as(a), a)
