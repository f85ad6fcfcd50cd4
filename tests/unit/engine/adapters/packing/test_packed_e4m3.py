"""A and B in e4m3: the rounding, and the layout in pages."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from loraplex.backends.fp8 import E4M3
from loraplex.engine.adapters.content_hash import ContentHashCache
from loraplex.engine.adapters.packing.rounding import TOP, round_pair
from loraplex.engine.adapters.peft_files import WEIGHTS_FILE, read_adapter
from loraplex.engine.adapters.target import AdapterTarget
from loraplex.engine.errors import AdapterError
from loraplex.engine.model.shard import ModuleShard, Piece, whole_modules
from loraplex.memory.adapter_layout import ModuleParts, ModuleShape, place_layer
from loraplex.memory.host.store import PackedAdapter

from helpers.models.peft_adapters import make_adapter
from helpers.models.peft_folders import SHAPES, edit_weights, make_target

KEY = "base_model.model.model.layers.{}.{}.lora_{}.weight"
MODULES = {0: "self_attn.q_proj", 1: "self_attn.k_proj", 6: "mlp.down_proj"}
RANK = 4


def target_of(**options: Any) -> AdapterTarget:
    return make_target(**{"dtype": torch.bfloat16, "weight_dtype": E4M3} | options)


@pytest.fixture
def folder(hf_model: PreTrainedModel, tmp_path: Path) -> Path:
    targets = [name.split(".")[1] for name in MODULES.values()]
    return make_adapter(hf_model, tmp_path / "a", r=RANK, alpha=12, targets=targets, use_dora=True)


def rows(packed: PackedAdapter, start: int, layer: int, width: int, packing: int) -> torch.Tensor:
    """The rows of a matrix, float32 [RANK, width]."""
    stride = -(-width // (64 * packing)) * 64 * packing
    numbers = packed.data[layer].view(E4M3).float()
    return numbers[start : start + RANK * stride].view(RANK, stride)[:, :width]


def pair(
    packed: PackedAdapter, layer: int, module: int, packing: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = SHAPES[module]
    a_start, b_start = (int(t[layer, module]) for t in (packed.a_start, packed.b_start))
    a = rows(packed, a_start, layer, shape.in_features, packing)
    return a, rows(packed, b_start, layer, shape.out_features, packing)


@pytest.mark.parametrize("num_threads", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_each_rank_is_near_to_the_file(
    folder: Path, dtype: torch.dtype, num_threads: int | None
) -> None:
    def dirty(num_bytes: int) -> torch.Tensor:
        return torch.full((num_bytes,), 0xFF, dtype=torch.uint8)

    packers = ThreadPoolExecutor(num_threads) if num_threads else None
    packing = dtype.itemsize
    packed = read_adapter("a", folder, target_of(dtype=dtype), allocate=dirty, packers=packers)
    assert packed.data.dtype is dtype and packed.data.isfinite().all()
    tensors = load_file(folder / WEIGHTS_FILE)
    for layer in range(3):
        for module, name in MODULES.items():
            a, b = pair(packed, layer, module, packing)
            want_a, want_b = (tensors[KEY.format(layer, name, side)] for side in "AB")
            got = packed.scale[layer, module] * b[:, :, None] * a[:, None, :]
            want = 3 * want_b.T[:, :, None] * want_a[:, None, :]
            most = want.abs().amax((1, 2), keepdim=True)
            torch.testing.assert_close(got / most, want / most, rtol=0.13, atol=1e-4)


def test_half_the_pages() -> None:
    kv, inner = 1024, 14336
    pairs = ((4096, 4096), (4096, kv), (4096, kv), (4096, 4096), (4096, inner), (inner, 4096))
    modules = whole_modules(tuple(ModuleShape(*pair) for pair in (*pairs[:5], *pairs[4:])))
    sizes = {"modules": modules, "page_elems": 32 * kv}
    plain = target_of(**sizes, weight_dtype=None).pages_of(16)
    assert target_of(**sizes).pages_of(16) == plain / 2


def test_the_hash_is_that_of_the_files(folder: Path) -> None:
    plain, packed = (read_adapter("a", folder, target_of(weight_dtype=t)) for t in (None, E4M3))
    assert packed.content_hash == plain.content_hash
    hashes = ContentHashCache()
    for _ in range(2):
        again = read_adapter("a", folder, target_of(), hash_cache=hashes)
        assert torch.equal(again.data, packed.data) and torch.equal(again.scale, packed.scale)


def test_a_rank_has_the_numbers_of_the_whole_row(folder: Path) -> None:
    modules = list(whole_modules(SHAPES))
    down = modules[6]
    modules[6] = ModuleShard(down.spec, Piece(80, 160, 80, 160), down.outputs)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key, tensor in tensors.items():
            if "lora_A" in key:
                tensor[:, :80] *= 5  # the largest numbers are on the other rank

    edit_weights(folder, change)
    whole = read_adapter("a", folder, target_of())
    part = read_adapter("a", folder, target_of(modules=tuple(modules)))
    assert torch.equal(part.scale, whole.scale)
    own = rows(part, int(part.a_start[1, 6]), 1, 80, packing=2)
    assert torch.equal(own, pair(whole, 1, 6)[0][:, 80:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["A", "B"])
def test_bad_weights_are_refused(folder: Path, side: str, bad: float) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[KEY.format(1, MODULES[1], side)][3, 2] = bad

    edit_weights(folder, change)
    with pytest.raises(AdapterError, match="layer 1 holds NaN or infinite"):
        read_adapter("a", folder, target_of())


def test_a_small_rank_is_as_precise_as_a_large_one() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1.0, 2.0**-12, 2.0**9, 0.0, 2.0**-5])
    a = torch.randn(2, 5, 40, generator=generator) * sizes[:, None]
    b = torch.randn(2, 30, 5, generator=generator) * torch.tensor([0.01, 7.0, 2.0**-9, 1.0, 0.0])
    a8, b8, scale = round_pair(a, b)
    assert a8.float().abs().max() <= 2.0**TOP and b8.float().abs().max() <= 2.0**TOP
    for rank in range(5):
        got = b8.float()[:, :, rank, None] * a8.float()[:, None, rank] * scale[:, None, None]
        want = b[:, :, rank, None] * a[:, None, rank]
        assert (got - want).norm() <= 0.05 * want.norm(), rank


def test_rounding_makes_no_adapter_weaker() -> None:
    """Ties of bfloat16 go to even numbers, which are smaller on the whole."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) for shape in ((1, 8, 500), (1, 400, 8)))
    a, b = a.bfloat16().float(), b.bfloat16().float()
    a8, b8, scale = round_pair(a, b)
    exact, rounded = (b @ a)[0], (b8.float() @ a8.float())[0] * scale
    assert abs((rounded * exact).sum() / exact.square().sum() - 1) < 5e-4


def test_zeros_and_tiny_numbers() -> None:
    zeros = torch.zeros(1, 2, 8)
    a8, b8, scale = round_pair(zeros, torch.full((1, 3, 2), 2.0**-140))
    assert not a8.float().any() and not b8.float().any() and scale.tolist() == [1.0]


@pytest.mark.parametrize("packing", [2, 4])
def test_vectors_start_at_whole_elements(packing: int) -> None:
    shapes = (ModuleShape(72, 36), ModuleShape(130, 520))
    segments, used = place_layer({0: ModuleParts(3, ("gain",)), 1: ModuleParts(1)}, shapes, packing)
    assert all(segment.start % 64 == 0 for segment in segments.values()) and used % 64 == 0
    assert segments[1, "B"].first == segments[1, "B"].start * packing
    assert (segments[0, "gain"].packing, segments[0, "gain"].row_elems) == (1, 36)
    assert segments[0, "gain"].start == used - 2 * 64
