"""Every backend of op ``lora`` against the fp32 loop.

What is not to be touched is poisoned with NaN: rows of no adapter and rows beyond the batch, in x
and in y, and all of the pool that is no weight.
"""

from typing import Any

import pytest
import torch

from loraplex.backends import registry
from loraplex.backends.lora.contract import apply_lora

from helpers.lora_cases import (
    POPULARITIES,
    LoRACase,
    draw_slots,
    make_batch,
    make_case,
    make_shapes,
    make_spec,
)
from helpers.oracles import lora_oracle

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
NAMES = [backend.name for backend in registry.list_backends("lora")]
GPU = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
NUM_PADDED = 3
NAN = float("nan")

ALL = range(7)
QKVO = range(4)
MIXED = (1, 2, 8, 16, 17, 64)
RANK_MIXES = {
    "1": [[{m: 1 for m in ALL}] * 2] * 3,
    "8": [[{m: 8 for m in QKVO}] * 2] * 9,
    "mixed": [[{m: r for m in ALL}] * 2 for r in MIXED],
    "large": [[{0: 100, 6: 256}, {0: 256, 4: 3}]],
    "subsets": [
        [{1: 4}, {}],
        [{}, {3: 5}],
        [{0: 2, 2: 9}, {0: 9, 2: 2}],
        [{5: 16, 6: 1}, {4: 1, 5: 3, 6: 16}],
        [{m: m + 1 for m in ALL}, {m: 7 - m for m in ALL}],
    ],
    "none": [],
}
SHAPES = {
    "odd": make_shapes(96, 120, 40, 200),
    "smol": make_shapes(576, 576, 192, 1536),
    "llama-2-7b": make_shapes(4096, 4096, 4096, 11008),
    "llama-3-8b": make_shapes(4096, 4096, 1024, 14336),
    "llama-3-8b half": make_shapes(4096, 2048, 512, 7168),
    "qwen2.5-7b": make_shapes(3584, 3584, 512, 18944),
}


def _make_op(name: str, case: LoRACase, max_num_tokens: int = 640) -> Any:
    backend = next(b for b in registry.list_backends("lora") if b.name == name)
    spec = make_spec(case, max_num_tokens)
    reason = backend.probe(spec)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return backend.make(spec)


def _as_bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def _make_inputs(
    case: LoRACase, group: Any, slots: list[int], num_rows: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, and a buffer whose [:-2, :-8] is y: what lies beside y must stay as it is."""
    device, dtype = case.pool.device, case.pool.dtype
    generator = torch.Generator(device).manual_seed(seed)
    width = sum(group.out_features)
    is_base = torch.tensor([slot < 0 for slot in slots], dtype=torch.bool, device=device)
    x = torch.full((num_rows, group.in_features), NAN, dtype=dtype, device=device)
    buffer = torch.full((num_rows + 2, width + 8), NAN, dtype=dtype, device=device)
    for tensor, columns in ((x, group.in_features), (buffer, width)):
        shape = (len(slots), columns)
        tensor[: len(slots), :columns] = torch.randn(shape, generator=generator, device=device)
        tensor[: len(slots)][is_base] = NAN
    return x, buffer


def _apply(op: Any, case: LoRACase, layer: int, group: Any, x: Any, buffer: Any) -> Any:
    target = buffer.clone()
    apply_lora(
        op, y=target[:-2, :-8], x=x, pool=case.pool, layer=layer, group=group, table=case.table
    )
    return target


def _check(op: Any, case: LoRACase, slots: list[int], num_padded: int = NUM_PADDED) -> None:
    op.plan(table=case.table, batch=make_batch(slots))
    pool_before = case.pool.clone()
    for layer in range(case.pool.shape[0]):
        for group in case.groups:
            x, buffer = _make_inputs(case, group, slots, len(slots) + num_padded, seed=layer)
            first, second = (_apply(op, case, layer, group, x, buffer) for _ in range(2))
            assert torch.equal(_as_bits(first), _as_bits(second)), "two runs differ"
            _compare(first, buffer, x, case, slots, layer, group)
    assert torch.equal(_as_bits(case.pool), _as_bits(pool_before))


def _compare(
    got: torch.Tensor,
    buffer: torch.Tensor,
    x: torch.Tensor,
    case: LoRACase,
    slots: list[int],
    layer: int,
    group: Any,
) -> None:
    weights = case.of_layer(layer)
    want = lora_oracle(buffer, x, group, slots, weights)
    is_same = _as_bits(got) == _as_bits(buffer)
    touched = torch.zeros_like(is_same)
    of_row = torch.tensor(slots, device=got.device)
    columns = zip(group.modules, group.out_starts, group.out_features, strict=True)
    for module, start, width in columns:
        named = [slot for slot, m in weights if m == module]
        rows = torch.isin(of_row, torch.tensor(named, device=got.device, dtype=of_row.dtype))
        touched[: len(slots), start : start + width] = rows[:, None]
    assert (is_same | touched).all(), f"layer {layer}, modules {group.modules}: strays"
    if touched.any():
        difference, norm = (got.float() - want)[touched].norm(), want[touched].norm()
        error = difference / norm
        assert error < TOLERANCE[case.pool.dtype], f"layer {layer}, {group.modules}: {error}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mix", RANK_MIXES)
@pytest.mark.parametrize("name", NAMES)
def test_rank_mixes(name: str, mix: str, dtype: torch.dtype, device: str) -> None:
    case = make_case(RANK_MIXES[mix], SHAPES["odd"], dtype=dtype, device=device)
    op = _make_op(name, case)
    _check(op, case, draw_slots("half-base", 33, case.num_adapters))


@pytest.mark.parametrize(
    ("device", "num_rows"),
    [
        *(("cpu", num_rows) for num_rows in (1, 3, 7, 133)),
        *(pytest.param("cuda", num_rows, marks=GPU) for num_rows in (1, 3, 7, 32, 133, 512)),
    ],
)
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("name", NAMES)
def test_popularities(name: str, popularity: str, num_rows: int, device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    case = make_case(RANK_MIXES["mixed"], SHAPES["odd"], dtype=dtype, device=device)
    op = _make_op(name, case)
    _check(op, case, draw_slots(popularity, num_rows, case.num_adapters, seed=num_rows))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("page_elems", [64, 512, 6144])
@pytest.mark.parametrize("name", NAMES)
def test_page_sizes(name: str, page_elems: int, shuffle: bool, device: str) -> None:
    case = make_case(
        [[{m: r for m in ALL}] for r in (3, 16)],
        SHAPES["smol"],
        dtype=torch.float16,
        device=device,
        page_elems=page_elems,
        shuffle=shuffle,
    )
    _check(_make_op(name, case), case, draw_slots("uniform", 9, case.num_adapters))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("long_from", [512, 16])
@pytest.mark.parametrize("name", NAMES)
def test_prefill_beside_decode(name: str, long_from: int, device: str) -> None:
    """Long runs of one adapter next to single rows of many, in kernels for few rows and for many
    where a backend has both."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    case = make_case(RANK_MIXES["mixed"], SHAPES["odd"], dtype=dtype, device=device)
    runs = [3] * 150 + [-1] * 40 + [7] * 17 + [1] * 16 + [9]
    few = [1, 3, 5, -1, 7, 9, 11]
    op = _make_op(name, case)
    if hasattr(op, "max_graph_rows"):
        op.max_graph_rows = long_from
    elif long_from != 512:
        pytest.skip(f"{name} has no kernels for many rows")
    _check(op, case, few + runs)
    if device == "cuda":
        _check(op, case, few + runs + [5] * 380)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_replanning_forgets_the_last_step(name: str, device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.float16
    case = make_case(RANK_MIXES["subsets"], SHAPES["odd"], dtype=dtype, device=device)
    op = _make_op(name, case)
    for seed, popularity in enumerate(("distinct", "base", "identical", "skewed")):
        _check(op, case, draw_slots(popularity, 5, case.num_adapters, seed))
    assert op.family in ("bgmv", "sgmv", "bmm")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", list(SHAPES)[1:])
@pytest.mark.parametrize("name", NAMES)
def test_model_shapes(name: str, shape: str, dtype: torch.dtype) -> None:
    adapters = [[{m: r for m in ALL}] for r in (*MIXED, 100, 256)]
    case = make_case(adapters, SHAPES[shape], dtype=dtype, device="cuda", page_elems=16384)
    op = _make_op(name, case)
    for popularity, num_rows in (("half-base", 70), ("identical", 32), ("distinct", 5)):
        _check(op, case, draw_slots(popularity, num_rows, case.num_adapters))


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [(16,) * 8, (8, 17, 64, 1, 2), (100, 256)], ids=str)
@pytest.mark.parametrize("shape", ["llama-3-8b", "qwen2.5-7b"])
@pytest.mark.parametrize("name", NAMES)
def test_prefill_mixes(name: str, shape: str, ranks: tuple[int, ...]) -> None:
    """Prompts of 1 to 2,000 tokens, their rows scattered in the second step."""
    adapters = [[{m: r for m in ALL}] for r in ranks]
    case = make_case(adapters, SHAPES[shape], dtype=torch.bfloat16, device="cuda", page_elems=32768)
    lengths = (1, 2000, 17, 64, 333, 1, 128, 500)
    slots = [
        slot
        for i, length in enumerate(lengths)
        for slot in [2 * (i % len(ranks)) + 1 if i != 3 else -1] * length
    ]
    op = _make_op(name, case, max_num_tokens=4096)
    _check(op, case, slots)
    _check(op, case, [slots[i * 7 % len(slots)] for i in range(1500)], num_padded=0)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 33, 64, 256])
@pytest.mark.parametrize("shape", ["odd", "llama-3-8b"])
@pytest.mark.parametrize("name", NAMES)
def test_graph_replays_any_batch(name: str, shape: str, num_rows: int) -> None:
    """Captured once with no work for each kind, replayed for whatever is planned later."""
    adapters = [[{m: r for m in ALL}] for r in (16, 16, 1, 8, 64, 17)] + [[{1: 4, 5: 32}]]
    dtype = torch.bfloat16
    case = make_case(adapters, SHAPES[shape], dtype=dtype, device="cuda", page_elems=16384)
    op, eager = _make_op(name, case), _make_op(name, case)
    if not op.graph_kinds:
        pytest.skip(f"{name} does not support graphs")
    places = [_make_inputs(case, group, [], num_rows, seed=0) for group in case.groups]

    def run() -> None:
        for group, (x, buffer) in zip(case.groups, places, strict=True):
            apply_lora(
                op, y=buffer[:-2, :-8], x=x, pool=case.pool, layer=0, group=group, table=case.table
            )

    graphs = {}
    for kind in op.graph_kinds:
        op.plan(table=case.table, batch=make_batch([-1] * num_rows), kind=kind)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graphs[kind] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[kind]):
            run()
    for seed, popularity in enumerate((*POPULARITIES, "distinct")):
        count = num_rows if seed % 2 == 0 else max(1, num_rows - 1 - seed)
        slots = draw_slots(popularity, count, case.num_adapters, seed)
        inputs = [_make_inputs(case, group, slots, num_rows, seed=seed) for group in case.groups]
        for old, new in zip(places, inputs, strict=True):
            for destination, source in zip(old, new, strict=True):
                destination.copy_(source)
        kind = op.kind_of(make_batch(slots))
        op.plan(table=case.table, batch=make_batch(slots), kind=kind)
        graphs[kind].replay()
        eager.plan(table=case.table, batch=make_batch(slots), kind=kind)
        for group, (x, buffer), (_, replayed) in zip(case.groups, inputs, places, strict=True):
            want = _apply(eager, case, 0, group, x, buffer)
            _compare(replayed, buffer, x, case, slots, 0, group)
            assert torch.equal(_as_bits(replayed), _as_bits(want)), "a replay differs from eager"
