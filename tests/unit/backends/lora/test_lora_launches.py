"""The launches of shrink and expand, for steps of all kinds, tables and pools: grids from the
documented formulas, pointers and scalars from the tensors. No GPU."""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from loraplex.backends.launch import cuda as cuda_launch  # noqa: E402
from loraplex.backends.launch import triton as triton_launch  # noqa: E402
from loraplex.backends.lora.contract import LoRAGroup, LoRAOp, apply_lora  # noqa: E402
from loraplex.backends.lora.hybrid import HybridLoRA  # noqa: E402
from loraplex.backends.lora.sgmv import triton_sgmv  # noqa: E402
from loraplex.backends.lora.sgmv.blocks import Tuned  # noqa: E402
from loraplex.backends.lora.sgmv.kernels import shrink_kernel  # noqa: E402

from helpers.fakes.fake_cuda import FakeCuda, Seen  # noqa: E402
from helpers.kernels.lora_cases import LoRACase, make_batch, make_case, make_shapes, make_spec  # noqa: E402

F16, PROCESSORS, STREAM, MAX_TOKENS, MAX_RANK = torch.float16, 132, 77, 1200, 32
SHAPES = make_shapes(192, 2200, 1040, 200)
CASES = [
    make_case([[{m: rank for m in range(7)}] * 2 for rank in ranks], SHAPES, dtype=F16)
    for ranks in ((32, 5), (9, 16, 24))
]
for _case in CASES:
    del _case.groups[1:3]  # fewer kernels to compile


@dataclass(frozen=True)
class Step:
    """A step to plan; for graphs if it has a kind. x and y may have more rows than the batch."""

    case: LoRACase
    slots: list[int]
    num_rows: int
    kind: str | None = None


FEW = [
    Step(CASES[0], [1, 3], 2),
    Step(CASES[0], [1, 3, 1, -1], 9),
    Step(CASES[1], [5], 1),
    Step(CASES[1], [-1] * 3, 3),
    Step(CASES[0], [3] * 512, 512),
    Step(CASES[0], [1] * 512, 512),  # of a rank above 16
]
MANY = [
    Step(CASES[0], [3] * 1100, 1100),
    Step(CASES[0], [-1] * 1100, 1100),
    Step(CASES[1], [1, 3, 5] * 400, 1200),
    Step(CASES[0], [1] * 30 + [-1] * 1100 + [3], 1131),
]


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    if not hasattr(shrink_kernel, "cache_key"):
        pytest.skip("the kernels were imported under TRITON_INTERPRET")
    fake = FakeCuda()
    monkeypatch.setattr(cuda_launch, "cuda_driver", lambda: fake)
    monkeypatch.setattr(triton_launch, "current_stream", lambda device_index: STREAM)
    monkeypatch.setattr(triton.runtime.driver, "_active", fake)
    monkeypatch.setattr(triton_sgmv, "describe_device", lambda device: (None, PROCESSORS))
    return fake


@pytest.fixture
def bgmv(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> Iterator[Any]:
    """The backend's module, without CuPy: kernels are numbers that the fake driver knows."""
    name = "loraplex.backends.lora.bgmv.cupy_bgmv"
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(RawModule=object))
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)

    def compile_(macros: tuple[str, ...], device_index: int) -> Any:
        function = 1000 + 2 * len(cuda.functions)
        for i, num_pointers in enumerate((7, 8)):
            kinds = ["u64"] * num_pointers + ["u32"] * 7
            cuda.functions[function + i] = (" ".join(macros), kinds)
        return module.Kernels(function, function + 1)

    monkeypatch.setattr(module, "compile_kernels", compile_)
    monkeypatch.setattr(module, "current_stream", lambda device_index: STREAM)
    properties = SimpleNamespace(multi_processor_count=PROCESSORS, major=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    yield module
    del sys.modules[name]


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def launches_of(
    op: LoRAOp, plan: Any, cuda: FakeCuda, step: Step, layer: int, group: LoRAGroup
) -> tuple[torch.Tensor, torch.Tensor, list[Seen]]:
    x = torch.zeros(step.num_rows, group.in_features + 8, dtype=F16)[:, : group.in_features]
    y = torch.zeros(step.num_rows, sum(group.out_features), dtype=F16)
    cuda.launches.clear()
    apply_lora(op, plan, y=y, x=x, pool=step.case.pool, layer=layer, group=group)
    return x, y, list(cuda.launches)


def sgmv_grids(step: Step, group: LoRAGroup, header: list[int]) -> list[int]:
    """The default blocks; for a graph's rows what the kernels could ever need, else the plan."""
    num_modules = len(group.modules)
    if step.num_rows <= 1024:
        items = ceil(num_modules * MAX_RANK, 16) * 16
        columns = sum(ceil(out, 128) for out in group.out_features)
        return [
            min(step.num_rows * items, 6 * PROCESSORS),
            min(step.num_rows * columns, 4 * PROCESSORS),
        ]
    counts = {slot: step.slots.count(slot) for slot in set(step.slots) - {-1}}
    if not counts:
        return []
    largest = largest_rank(step)
    is_prefill = sum(counts.values()) >= (9 if largest > 16 else 48) * len(counts)
    rows = 64 if is_prefill else 16
    ranks = ceil_power(largest * num_modules) if is_prefill else 16
    rank = step.case.table.host_rank[0, list(group.modules)].sum(0)
    tiles = sum(ceil(count, rows) for count in counts.values())
    items = sum(
        ceil(count, rows) * ceil(int(rank[slot]), min(64, ranks)) for slot, count in counts.items()
    )
    assert header[0] == items and header[2] == tiles
    panels = sum(ceil(out, 128 * header[6]) for out in group.out_features)
    return [items * header[4], tiles * panels]


def largest_rank(step: Step) -> int:
    used = int(step.case.table.host_rank[:, :, step.slots].max())
    return next(size for size in (16, 32) if used <= size)


def ceil_power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def test_sgmv(cuda: FakeCuda) -> None:
    op = triton_sgmv.TritonSGMV(make_spec(CASES[0], MAX_TOKENS, MAX_RANK), Tuned())
    for step in (*FEW, *MANY, Step(CASES[0], [], 7, "sgmv"), *FEW[::-1], *MANY[:2]):
        check_sgmv(op, cuda, step, op.scratch)


def plan_step(op: Any, step: Step) -> Any:
    batch, table = make_batch(step.slots), step.case.table
    if step.kind is None:
        return op.plan(table=table, batch=batch)
    return op.plan_graph(table=table, batch=batch, kind=step.kind)


def check_sgmv(op: Any, cuda: FakeCuda, step: Step, scratch: torch.Tensor) -> str:
    case, table, plan = step.case, step.case.table, plan_step(op, step)
    strides = [case.pool.stride(0), table.page_table.stride(0),
               *(table.rank.stride(i) for i in (0, 2, 1))]  # fmt: skip
    common = [plan.meta, scratch, case.pool, table.page_table, table.rank]
    for layer in (1, 0):
        for index, group in enumerate(case.groups):
            header = plan.meta[16 * index :][:16].tolist()
            x, y, seen = launches_of(op, plan, cuda, step, layer, group)
            grids = sgmv_grids(step, group, header)
            assert [one.grid for one in seen] == [(grid, 1, 1) for grid in grids]
            lasts = ([table.a_start], [table.b_start, table.scale])
            for one, first, last in zip(seen, (x, y), lasts, strict=False):
                pointers = [tensor.data_ptr() for tensor in (first, *common, *last)]
                # The compiled kernel knows strides of 1.
                kept = [stride for stride in (first.stride(0), *strides) if stride != 1]
                assert one.arguments == [*pointers, layer, *kept, 0, 0]
                assert one.stream == STREAM
    return plan.family


def check_bgmv(op: Any, cuda: FakeCuda, step: Step, scratch: torch.Tensor) -> str:
    case, table, plan = step.case, step.case.table, plan_step(op, step)
    fill, most = {"distinct": (3, 16), "shared": (3, 3), "many": (2, 4)}[plan.kind]
    tile_rows, width = {"distinct": (1, 1024), "shared": (4, 1024), "many": (16, 256)}[plan.kind]
    num_tiles = ceil(step.num_rows, 4) if plan.kind == "many" else step.num_rows
    scalars = [table.page_table.stride(0), table.rank.stride(2), table.rank.stride(1),
               1024 if len(step.slots) <= 1024 else MAX_TOKENS, 3 * MAX_RANK, MAX_RANK]  # fmt: skip
    for layer in (1, 0):
        for group in case.groups:
            x, y, seen = launches_of(op, plan, cuda, step, layer, group)
            columns = sum(ceil(out, width) for out in group.out_features)
            assert [one.grid[0] for one in seen] == [
                max(fill * PROCESSORS, step.num_rows * len(group.modules)),
                min(num_tiles * columns, most * PROCESSORS),
            ]
            fields = ([table.a_start], [table.b_start, table.scale])
            for one, first, last in zip(seen, (x, y), fields, strict=True):
                of_layer = [field[layer, group.modules[0]] for field in (table.rank, *last)]
                pool = case.pool[layer].data_ptr()
                pointers = [first.data_ptr(), scratch.data_ptr(), pool, plan.address]
                pointers += [tensor.data_ptr() for tensor in (table.page_table, *of_layer)]
                assert one.arguments == [*pointers, first.stride(0), *scalars]
                macros = one.name.split()
                assert f"-DGROUP={case.groups.index(group)}" in macros
                assert f"-DROWS={tile_rows}" in macros
                assert one.stream == STREAM and one.is_pdl
    return plan.family


def test_bgmv(cuda: FakeCuda, bgmv: Any) -> None:
    op = bgmv.CupyBGMV(make_spec(CASES[0], MAX_TOKENS, MAX_RANK))
    captures = [Step(CASES[0], [], 7, kind) for kind in ("distinct", "shared", "many")]
    for step in (*FEW, *MANY, *captures, *FEW[::-1], *MANY[:2]):
        check_bgmv(op, cuda, step, op.scratch)


def test_hybrid_launches_what_its_halves_do(cuda: FakeCuda, bgmv: Any) -> None:
    spec = make_spec(CASES[0], MAX_TOKENS, MAX_RANK)
    halves = bgmv.CupyBGMV(spec), triton_sgmv.TritonSGMV(spec)
    op = HybridLoRA(spec, halves)
    captures = [Step(CASES[0], [], 7, kind) for kind in ("distinct", "sgmv", "shared")]
    families: set[str] = set()
    few = [False] * 4 + [True, False]
    expected = [*few, True, False, True, False, False, True, False, *few]
    for step, many in zip((*FEW, *MANY, *captures, *FEW), expected, strict=True):
        check = check_sgmv if many else check_bgmv
        families.add(check(op, cuda, step, halves[many].scratch))
    assert families == {"bgmv", "sgmv"}


def test_plans_lie_apart(cuda: FakeCuda, bgmv: Any) -> None:
    """Launches read their own plan's memory. A dropped plan's is used again, a graph's is fixed."""
    spec, case = make_spec(CASES[0], MAX_TOKENS, MAX_RANK), CASES[0]
    step = Step(case, [1, 3], 2)
    for op, place in ((triton_sgmv.TritonSGMV(spec, Tuned()), 1), (bgmv.CupyBGMV(spec), 3)):

        def address_of(plan: Any, op: Any = op, place: int = place) -> int:
            *_, seen = launches_of(op, plan, cuda, step, 0, case.groups[0])
            (address,) = {one.arguments[place] for one in seen}
            return address

        plans = [plan_step(op, step) for _ in range(3)]
        addresses = [address_of(plan) for plan in plans]
        assert len(set(addresses)) == 3 and address_of(plans[0]) == addresses[0]
        for kind in op.graph_kinds:
            graph_step = Step(case, [1, 3], 2, kind)
            static = {address_of(plan_step(op, graph_step)) for _ in range(3)}
            assert len(static) == 1 and not static & set(addresses)
        del plans[1]
        assert address_of(plan_step(op, step)) == addresses[1]


def test_launches_follow_the_pool(cuda: FakeCuda, bgmv: Any) -> None:
    spec, case = make_spec(CASES[0], MAX_TOKENS, MAX_RANK), CASES[0]
    other = case.pool.clone()
    for op, place in ((triton_sgmv.TritonSGMV(spec, Tuned()), 3), (bgmv.CupyBGMV(spec), 2)):
        plan = op.plan(table=case.table, batch=make_batch([1]))
        for pool in (case.pool, case.pool, other, case.pool):
            step = Step(LoRACase(pool, case.table, SHAPES, case.groups, 2), [1], 1)
            *_, seen = launches_of(op, plan, cuda, step, 0, case.groups[0])
            assert all(one.arguments[place] == pool.data_ptr() for one in seen)
