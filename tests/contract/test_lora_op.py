"""Every backend of op ``lora`` against the fp32 loop."""

from typing import Any

import pytest
import torch

from loraplex.backends import registry
from loraplex.backends.lora.contract import LoRABatch, LoRASpec

from helpers.lora_cases import (
    POPULARITIES,
    LoRACase,
    draw_slots,
    make_batch,
    make_case,
    make_shapes,
)
from helpers.oracles import lora_oracle

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
NAMES = [backend.name for backend in registry.list_backends("lora")]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SENTINEL = 7.0

ALL = range(7)
QKVO = range(4)
RANK_MIXES = {
    "1": [[{m: 1 for m in ALL}] * 2] * 3,
    "8": [[{m: 8 for m in QKVO}] * 2] * 9,
    "mixed": [
        [{m: r for m in ALL}] * 2 for r in (1, 2, 8, 16, 17, 64)
    ],
    "large": [[{0: 100, 6: 256}, {0: 256, 4: 3}]],
    "subsets": [
        [{1: 4}, {}],
        [{}, {3: 5}],
        [{0: 2, 2: 9}, {0: 9, 2: 2}],
        [{5: 16, 6: 1}, {4: 1, 5: 3, 6: 16}],
        [{m: m + 1 for m in ALL}, {m: 7 - m for m in ALL}],
    ],
    "none": [],
}  # fmt: skip
SHAPES = {
    "odd": make_shapes(96, 120, 40, 200),
    "smol": make_shapes(576, 576, 192, 1536),
}


def _make_op(name: str, dtype: torch.dtype, device: str, max_rank: int = 256) -> Any:
    spec = LoRASpec(max_num_tokens=512, max_rank=max_rank, dtype=dtype, device=torch.device(device))
    backend = registry.resolve("lora", name) if name == "auto" else _named(name)
    reason = backend.probe(spec)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return backend.make(spec)


def _named(name: str) -> registry.Backend:
    return next(backend for backend in registry.list_backends("lora") if backend.name == name)


def _check(op: Any, case: LoRACase, batch: LoRABatch, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(5)
    op.plan(table=case.table, batch=batch)
    pool_before = case.pool.clone()
    for layer in range(case.pool.shape[0]):
        for group in case.groups:
            width = sum(group.out_features)
            x = torch.randn(batch.num_tokens, group.in_features, generator=generator).to(dtype)
            y = torch.randn(batch.num_tokens, width, generator=generator).to(dtype)
            # y and x are views of larger buffers: what lies beside them must stay as it is.
            buffer = torch.full((batch.num_tokens + 2, width + 8), SENTINEL, dtype=dtype)
            buffer[:-2, :width] = y
            buffer = buffer.to(device)
            runs = []
            for _ in range(2):
                target = buffer.clone()
                op.apply(
                    y=target[:-2, :width],
                    x=x.to(device),
                    pool=case.pool,
                    layer=layer,
                    group=group,
                    table=case.table,
                    batch=batch,
                )
                runs.append(target)
            assert torch.equal(runs[0], runs[1])
            got = runs[0].cpu()
            assert (got[-2:] == SENTINEL).all() and (got[:, width:] == SENTINEL).all()
            _compare(got[:-2, :width], y, x, case, batch, layer, group)
    assert torch.equal(case.pool.nan_to_num(9.0), pool_before.nan_to_num(9.0))


def _compare(
    got: torch.Tensor,
    y: torch.Tensor,
    x: torch.Tensor,
    case: LoRACase,
    batch: LoRABatch,
    layer: int,
    group: Any,
) -> None:
    weights = case.of_layer(layer)
    want = lora_oracle(y, x, group, batch, weights)
    slots = batch.token_slots.tolist()
    columns = zip(group.modules, group.out_starts, group.out_features, strict=True)
    for module, start, width in columns:
        untouched = [row for row, slot in enumerate(slots) if (slot, module) not in weights]
        block = slice(start, start + width)
        assert torch.equal(got[untouched, block], y[untouched, block])
    error = (got.float() - want).norm() / want.norm().clamp(min=1e-6)
    assert error < TOLERANCE[y.dtype], f"layer {layer}, modules {group.modules}: {error}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mix", RANK_MIXES)
@pytest.mark.parametrize("name", NAMES)
def test_rank_mixes(name: str, mix: str, dtype: torch.dtype, device: str) -> None:
    op = _make_op(name, dtype, device)
    case = make_case(RANK_MIXES[mix], SHAPES["odd"], dtype=dtype, device=device)
    slots = draw_slots("half-base", 33, case.num_adapters)
    _check(op, case, make_batch(slots, device), dtype, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_rows", [1, 3, 7, 133])
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("name", NAMES)
def test_popularities(name: str, popularity: str, num_rows: int, device: str) -> None:
    op = _make_op(name, torch.float32 if device == "cpu" else torch.bfloat16, device)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    case = make_case(RANK_MIXES["mixed"], SHAPES["odd"], dtype=dtype, device=device)
    slots = draw_slots(popularity, num_rows, case.num_adapters, seed=num_rows)
    _check(op, case, make_batch(slots, device), dtype, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("page_elems", [64, 512, 6144])
@pytest.mark.parametrize("name", NAMES)
def test_page_sizes(name: str, page_elems: int, shuffle: bool, device: str) -> None:
    dtype = torch.float16
    op = _make_op(name, dtype, device)
    adapters = [[{m: r for m in ALL}] for r in (3, 16)]
    case = make_case(
        adapters,
        SHAPES["smol"],
        dtype=dtype,
        device=device,
        page_elems=page_elems,
        shuffle=shuffle,
    )
    slots = draw_slots("uniform", 9, case.num_adapters)
    _check(op, case, make_batch(slots, device), dtype, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_prefill_beside_decode(name: str, device: str) -> None:
    """Long runs of one adapter next to single rows of many."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    op = _make_op(name, dtype, device)
    case = make_case(RANK_MIXES["mixed"], SHAPES["odd"], dtype=dtype, device=device)
    slots = [1, 3, 5, -1, 7, 9, 11] + [3] * 150 + [-1] * 40 + [7] * 17 + [1] * 16 + [9]
    _check(op, case, make_batch(slots, device), dtype, device)


@pytest.mark.parametrize("name", NAMES)
def test_replanning_forgets_the_last_step(name: str) -> None:
    op = _make_op(name, torch.float32, "cpu")
    case = make_case(RANK_MIXES["subsets"], SHAPES["odd"], dtype=torch.float32)
    for seed, popularity in enumerate(("distinct", "base", "identical", "skewed")):
        slots = draw_slots(popularity, 5, case.num_adapters, seed)
        _check(op, case, make_batch(slots), torch.float32, "cpu")
