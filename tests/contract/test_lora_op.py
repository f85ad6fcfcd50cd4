"""Every backend of op ``lora`` against the fp32 loop of helpers/kernels/lora_checks.py."""

from typing import Any

import pytest
import torch

from loraplex.backends import registry
from loraplex.backends.fp8 import E4M3
from loraplex.backends.lora.contract import GraphKindError, apply_lora

from helpers.kernels.lora_cases import (
    POPULARITIES,
    LoRACase,
    draw_slots,
    make_batch,
    make_case,
    make_shapes,
    make_spec,
)
from helpers.kernels.lora_checks import (
    TOLERANCE,
    apply,
    as_bits,
    check,
    check_group,
    compare,
    make_inputs,
)

NAMES = [backend.name for backend in registry.list_backends("lora")]
GPU = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]

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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mix", RANK_MIXES)
@pytest.mark.parametrize("name", NAMES)
def test_rank_mixes(name: str, mix: str, dtype: torch.dtype, device: str) -> None:
    case = make_case(RANK_MIXES[mix], SHAPES["odd"], dtype=dtype, device=device)
    op = _make_op(name, case)
    check(op, case, draw_slots("half-base", 33, case.num_adapters))


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
    check(op, case, draw_slots(popularity, num_rows, case.num_adapters, seed=num_rows))


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
    check(_make_op(name, case), case, draw_slots("uniform", 9, case.num_adapters))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("slots", [[1, -1, 3], [3] * 19], ids=["few", "many"])
@pytest.mark.parametrize("name", NAMES)
def test_weights_in_e4m3(name: str, slots: list[int], device: str) -> None:
    """A and B in 8 bits, and the vectors behind them in 16, in the pages of a pool of 16 bits."""
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    shapes = SHAPES["odd" if device == "cpu" else "llama-3-8b"]
    ranks = [[{m: r for m in ALL}] for r in (3, 17)]
    case = make_case(
        ranks, shapes, dtype=dtype, device=device, weight_dtype=E4M3, vectors=[("gain",)]
    )
    if device == "cpu":
        del case.groups[1:3]
    op = _make_op(name, case)
    if hasattr(op, "max_graph_rows"):
        op.max_graph_rows = min(op.max_graph_rows, 16)
    check(op, case, slots, num_padded=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("long_from", [512, 16])
@pytest.mark.parametrize("name", NAMES)
def test_prefill_beside_decode(name: str, long_from: int, device: str) -> None:
    """Long runs of one adapter next to single rows of many, in kernels for few rows and for many
    where a backend has both."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    case = make_case(RANK_MIXES["mixed"], SHAPES["odd"], dtype=dtype, device=device)
    long, bare = (150, 40) if device == "cuda" else (66, 3)
    runs = [3] * long + [-1] * bare + [7] * 17 + [1] * 16 + [9]
    few = [1, 3, 5, -1, 7, 9, 11]
    op = _make_op(name, case)
    if hasattr(op, "max_graph_rows"):
        op.max_graph_rows = long_from
    elif long_from != 512:
        pytest.skip(f"{name} has no kernels for many rows")
    check(op, case, few + runs)
    if device == "cuda":
        check(op, case, few + runs + [5] * 380)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_replanning_forgets_the_last_step(name: str, device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.float16
    case = make_case(RANK_MIXES["subsets"], SHAPES["odd"], dtype=dtype, device=device)
    op = _make_op(name, case)
    for seed, popularity in enumerate(("distinct", "base", "identical", "skewed")):
        check(op, case, draw_slots(popularity, 5, case.num_adapters, seed))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_plans_are_independent(name: str, device: str) -> None:
    """Two eager plans are alive at one time and run in turn; more are made and dropped between."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    case = make_case(RANK_MIXES["subsets"], SHAPES["odd"], dtype=dtype, device=device)
    op = _make_op(name, case)
    steps = [draw_slots("uniform", 7, case.num_adapters), draw_slots("half-base", 33, 5, seed=1)]
    if device == "cuda":
        steps.append([1] * 600)  # more rows than a graph takes
    batches = [make_batch(slots) for slots in steps]
    plans = [op.plan(table=case.table, batch=batch) for batch in batches]
    for layer in range(case.pool.shape[0]):
        for group in case.groups:
            for plan, slots in zip(plans, steps, strict=True):
                check_group(op, plan, case, slots, layer, group)
            op.plan(table=case.table, batch=batches[1 - layer])
            for kind in op.graph_kinds:
                op.plan_graph(table=case.table, batch=make_batch([3]), kind=kind)
    for plan, batch in zip(plans, batches, strict=True):
        assert plan.kind == op.kind_of(table=case.table, batch=batch)
        assert plan.family in ("bgmv", "sgmv", "bmm")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_what_graphs_cannot_hold(name: str, device: str) -> None:
    case = make_case(RANK_MIXES["8"], SHAPES["odd"], dtype=torch.float16, device=device)
    op = _make_op(name, case)
    with pytest.raises(GraphKindError, match="no graphs of kind 'absent'"):
        op.plan_graph(table=case.table, batch=make_batch([1]), kind="absent")
    if op.graph_kinds:
        batch = make_batch([1] * (op.max_graph_rows + 1))
        with pytest.raises(ValueError, match=f"batch of {batch.num_tokens} rows does not fit"):
            op.plan_graph(table=case.table, batch=batch, kind=op.graph_kinds[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", list(SHAPES)[1:])
@pytest.mark.parametrize("name", NAMES)
def test_model_shapes(name: str, shape: str, dtype: torch.dtype) -> None:
    adapters = [[{m: r for m in ALL}] for r in (*MIXED, 100, 256)]
    case = make_case(adapters, SHAPES[shape], dtype=dtype, device="cuda", page_elems=16384)
    op = _make_op(name, case)
    for popularity, num_rows in (("half-base", 70), ("identical", 32), ("distinct", 5)):
        check(op, case, draw_slots(popularity, num_rows, case.num_adapters))


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
    check(op, case, slots)
    check(op, case, [slots[i * 7 % len(slots)] for i in range(1500)], num_padded=0)


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
    places = [make_inputs(case, group, [], num_rows, seed=0) for group in case.groups]

    def run(plan: Any) -> None:
        for group, (x, buffer) in zip(case.groups, places, strict=True):
            apply_lora(op, plan, y=buffer[:-2, :-8], x=x, pool=case.pool, layer=0, group=group)

    graphs = {}
    for kind in op.graph_kinds:
        plan = op.plan_graph(table=case.table, batch=make_batch([-1] * num_rows), kind=kind)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run(plan)
        torch.cuda.current_stream().wait_stream(stream)
        graphs[kind] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[kind]):
            run(plan)
    for seed, popularity in enumerate((*POPULARITIES, "distinct")):
        count = num_rows if seed % 2 == 0 else max(1, num_rows - 1 - seed)
        slots = draw_slots(popularity, count, case.num_adapters, seed)
        inputs = [make_inputs(case, group, slots, num_rows, seed=seed) for group in case.groups]
        for old, new in zip(places, inputs, strict=True):
            for destination, source in zip(old, new, strict=True):
                destination.copy_(source)
        kind = op.kind_of(table=case.table, batch=make_batch(slots))
        plan = op.plan_graph(table=case.table, batch=make_batch(slots), kind=kind)
        assert plan.kind == kind
        graphs[kind].replay()
        eager_plan = eager.plan(table=case.table, batch=make_batch(slots))
        for group, (x, buffer), (_, replayed) in zip(case.groups, inputs, places, strict=True):
            want = apply(eager, eager_plan, case, 0, group, x, buffer)
            compare(replayed, buffer, x, case, slots, 0, group)
            assert torch.equal(as_bits(replayed), as_bits(want)), "a replay differs from eager"
