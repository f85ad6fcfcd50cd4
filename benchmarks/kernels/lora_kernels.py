"""Measures how close the LoRA op comes to the memory floor: one layer's four calls in a CUDA graph.

Every layer has its own weights, so that a replay never finds them in the L2 cache. Inputs are
random. The floor of a row counts the weights of its distinct adapters at true rank, one read of x,
and one read and one write of y, over the copy bandwidth measured in the same run.

    python benchmarks/kernels/lora_kernels.py --backends triton,cupy --out lora.jsonl

With `--adapter-dtypes auto,fp8` each case is measured with A and B in 16 bits and in e4m3.
"""

import argparse
import itertools
import json
import platform
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lora_panels import draw_rows

from loraplex.backends.fp8 import E4M3
from loraplex.backends.lora.contract import (
    LoRABatch,
    LoRAGroup,
    LoRAOp,
    LoRAPlan,
    LoRASpec,
    LoRATable,
    apply_lora,
)
from loraplex.backends.lora.table_fields import make_fields
from loraplex.backends.registry import resolve
from loraplex.entrypoints.bench.gpu_timing import copy_bandwidth, time_graph
from loraplex.entrypoints.bench.traces import adapters_of_rows
from loraplex.memory.adapter_layout import (
    ROW_ALIGN,
    ModuleParts,
    ModuleShape,
    num_pages,
    place_layer,
)

BLOCK_TOKENS = 16


@dataclass(frozen=True)
class Model:
    hidden: int
    kv: int
    intermediate: int

    @property
    def shapes(self) -> tuple[ModuleShape, ...]:
        h, kv, i = self.hidden, self.kv, self.intermediate
        pairs = ((h, h), (h, kv), (h, kv), (h, h), (h, i), (h, i), (i, h))
        return tuple(ModuleShape(*pair) for pair in pairs)


MODELS = {
    "llama-2-7b": Model(4096, 4096, 11008),
    "llama-3-8b": Model(4096, 1024, 14336),
    "qwen2.5-7b": Model(3584, 512, 18944),
    "smollm2-135m": Model(576, 192, 1536),
}
QKVO, ALL = (0, 1, 2, 3), (0, 1, 2, 3, 4, 5, 6)
GROUPS = ((0, 1, 2), (3,), (4, 5), (6,))


@dataclass(frozen=True)
class Case:
    """One row of the table. Adapters take `ranks` in turn."""

    model: str
    ranks: tuple[int, ...]
    modules: tuple[int, ...]
    num_tokens: int
    popularity: str
    num_resident: int = 0  # adapters in pages; 0: those of the batch
    num_layers: int = 32
    pool_adapters: int = 0  # that the pool has room for; 0: those in pages
    seed: int = 0  # of where the pages lie, and of which adapters are used


def default_cases() -> list[Case]:
    eight = [
        Case("llama-3-8b", (16,), ALL, batch, popularity)
        for batch in (1, 8, 32, 64, 128, 256)
        for popularity in ("distinct", "uniform", "skewed", "identical")
        if batch > 1 or popularity == "identical"
    ]
    seven = [Case("llama-2-7b", (8,), QKVO, 32, name) for name in ("distinct", "identical")]
    mixed = [Case("llama-2-7b", (8, 16, 32, 64), QKVO, 64, "distinct")]
    crossover = [
        Case(model, ranks, modules, rows, f"runs-{rows // rows_per_adapter}", num_layers=8)
        for model, ranks, modules in (
            ("llama-3-8b", (16,), ALL),
            ("llama-3-8b", (64,), ALL),
            ("llama-2-7b", (8,), QKVO),
            ("llama-2-7b", (8, 16, 32, 64), QKVO),
        )
        for rows in (192, 512, 1024, 2048)
        for rows_per_adapter in (4, 8, 16, 32, 128)
        if rows >= rows_per_adapter
    ]
    prefill = [
        Case("llama-3-8b", (16,), ALL, 4096, "runs-8", num_layers=8),
        Case("llama-3-8b", (16,), ALL, 4096, "runs-1", num_layers=8),
        Case("llama-3-8b", (64, 8), ALL, 4096, "runs-8", num_layers=8),
    ]
    resident = [
        replace(case, num_resident=n, pool_adapters=2000, seed=seed)
        for case in (
            Case("llama-3-8b", (16,), ALL, 64, "identical", num_layers=4),
            Case("llama-2-7b", (8,), QKVO, 64, "identical"),
            Case("llama-2-7b", (8,), QKVO, 64, "distinct"),
        )
        for seed in range(3)
        for n in (1, 2000)
    ]
    return [*eight, *seven, *mixed, *crossover, *prefill, *resident]


def rows_of(case: Case) -> list[int]:
    """Returns the adapter of each row. "runs-n" is a prefill of n prompts, one adapter each."""
    if case.popularity.startswith("runs-"):
        count = int(case.popularity.removeprefix("runs-"))
        return [row * count // case.num_tokens for row in range(case.num_tokens)]
    return adapters_of_rows(case.popularity, case.num_tokens, case.num_tokens)


class Setup:
    """Pool, table and batch of one case, filled with random weights."""

    def __init__(
        self,
        case: Case,
        dtype: torch.dtype,
        device: torch.device,
        model: Model | None = None,
        weight_dtype: torch.dtype | None = None,
    ) -> None:
        """`model` replaces the sizes of the model that the case names; `weight_dtype` is
        LoRASpec's."""
        self.case, self.model = case, model or MODELS[case.model]
        self.weight_dtype = weight_dtype
        self.packing = dtype.itemsize // (weight_dtype or dtype).itemsize
        self.page_elems = BLOCK_TOKENS * 2 * self.model.kv
        rows = rows_of(case)
        count = max(case.num_resident, max(rows) + 1)
        ranks = [case.ranks[slot % len(case.ranks)] for slot in range(count)]
        self.table, total = self._fill_table(ranks, device)
        shape = (case.num_layers, total, self.page_elems)
        self.pool = torch.empty(shape, dtype=dtype, device=device)
        for layer in self.pool:
            layer.normal_(std=0.05)
            if weight_dtype is not None:
                numbers = layer.view(weight_dtype)
                numbers.copy_(0.05 * torch.randn(numbers.shape, dtype=dtype, device=device))
        rng = np.random.default_rng(case.seed)
        picks = rng.permutation(count)[: max(rows) + 1]
        slots = [int(picks[row]) for row in rows]
        self.batch = make_batch(slots)
        self.used_ranks = [ranks[slot] for slot in sorted(set(slots))]
        self.groups = [self._group(modules) for modules in GROUPS if modules[0] in case.modules]

        def random(width: int) -> torch.Tensor:
            return torch.randn(case.num_tokens, width, dtype=dtype, device=device)

        self.x = [random(group.in_features) for group in self.groups]
        self.y = [random(sum(group.out_features)) for group in self.groups]

    def _fill_table(self, ranks: list[int], device: torch.device) -> tuple[LoRATable, int]:
        case, shapes = self.case, self.model.shapes
        layouts = {
            rank: (
                segments,
                num_pages(num_elems, self.page_elems),
            )
            for rank in set(ranks)
            for segments, num_elems in [
                place_layer(dict.fromkeys(case.modules, ModuleParts(rank)), shapes, self.packing)
            ]
        }
        total = sum(layouts[rank][1] for rank in ranks)
        total = total * max(case.pool_adapters, len(ranks)) // len(ranks)
        pages = np.random.default_rng(case.seed + 1).permutation(total).astype(np.int32)
        page_table = np.zeros((len(ranks), max(n for _, n in layouts.values())), dtype=np.int32)
        fields = np.zeros((3, case.num_layers, 7, len(ranks)), dtype=np.int32)
        used = 0
        for slot, rank in enumerate(ranks):
            segments, count = layouts[rank]
            page_table[slot, :count] = pages[used : used + count]
            used += count
            for (module, name), segment in segments.items():
                fields[0, :, module, slot] = segment.num_rows
                fields[1 if name == "A" else 2, :, module, slot] = segment.first
        scale = np.full(fields.shape[1:], 0.5, dtype=np.float32)
        host = [torch.from_numpy(array) for array in (page_table, *fields, scale)]
        there = make_fields(case.num_layers, 7, len(ranks), device)
        for view, field in zip(there, host[1:], strict=True):
            view.copy_(field.view(torch.int32))
        views = (*there[:3], there[3].view(torch.float32))
        none = torch.zeros_like(host[1])  # no adapter has a gain or a shift
        vectors, has = (none, none), torch.zeros(len(ranks), dtype=torch.bool)
        on_device = [none.to(device), none.to(device)]
        table = LoRATable(host[0].to(device), *views, *on_device, *host, *vectors, has)
        return table, total

    def _group(self, modules: tuple[int, ...]) -> LoRAGroup:
        shapes = self.model.shapes
        outs = tuple(shapes[module].out_features for module in modules)
        starts = tuple(sum(outs[:i]) for i in range(len(outs)))
        return LoRAGroup(modules, shapes[modules[0]].in_features, starts, outs, ROW_ALIGN)

    @property
    def num_bytes(self) -> int:
        """The bytes that one layer must move."""
        shapes = self.model.shapes
        per_rank = sum(
            shapes[module].in_features + shapes[module].out_features for module in self.case.modules
        )
        rows = sum(t.numel() for t in self.x) + 2 * sum(t.numel() for t in self.y)
        weights = sum(self.used_ranks) * per_rank
        return (weights // self.packing + rows) * self.pool.element_size()

    def run_layer(self, op: LoRAOp, plan: LoRAPlan, layer: int) -> None:
        for group, x, y in zip(self.groups, self.x, self.y, strict=True):
            apply_lora(op, plan, y=y, x=x, pool=self.pool, layer=layer, group=group)

    def spec(self) -> LoRASpec:
        """Returns the spec of a worker whose largest step is this case."""
        return LoRASpec(
            max_num_tokens=self.case.num_tokens,
            max_rank=max(16, *self.case.ranks),
            dtype=self.pool.dtype,
            device=self.pool.device,
            page_elems=self.page_elems,
            groups=tuple(self.groups),
            weight_dtype=self.weight_dtype,
        )


def make_batch(slots: list[int]) -> LoRABatch:
    order = sorted(range(len(slots)), key=lambda row: (slots[row], row))
    in_order = np.array([slots[row] for row in order])
    starts = [0, *(np.flatnonzero(np.diff(in_order)) + 1).tolist()]
    return LoRABatch(
        num_tokens=len(slots),
        token_order=np.array(order, dtype=np.int32),
        segment_starts=np.array([*starts, len(slots)], dtype=np.int32),
        segment_slots=in_order[starts].astype(np.int32),
    )


def measure(
    case: Case, op_name: str, adapter_dtype: str, bandwidth: float, dtype: torch.dtype
) -> dict[str, object]:
    device = torch.device("cuda", 0)
    setup = Setup(case, dtype, device, weight_dtype=E4M3 if adapter_dtype == "fp8" else None)
    op = resolve("lora", op_name).make(setup.spec())
    batch: dict[str, Any] = {"table": setup.table, "batch": setup.batch}
    if case.num_tokens <= op.max_graph_rows:
        plan = op.plan_graph(**batch, kind=op.kind_of(**batch))
    else:
        plan = op.plan(**batch)  # the engine runs longer steps eagerly

    def run() -> None:
        for layer in range(case.num_layers):
            setup.run_layer(op, plan, layer)

    times = [t / case.num_layers for t in time_graph(run, 30)]
    floor = setup.num_bytes / bandwidth * 1e6
    median = statistics.median(times)
    return {
        **asdict(case),
        "backend": op_name,
        "adapter_dtype": adapter_dtype,
        "us": round(median, 2),
        "us_min": round(min(times), 2),
        "floor_us": round(floor, 2),
        "ratio": round(median / floor, 2),
        "num_adapters": len(setup.used_ranks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", default="triton,cupy")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--adapter-dtypes", default="auto", help="of auto and fp8")
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    parser.add_argument(
        "--draw", type=Path, help="measure nothing; draw this file's rows beside it (matplotlib)"
    )
    parser.add_argument("--only", default="", help="model name, or part of it")
    options = parser.parse_args()
    if options.draw:
        rows = [json.loads(line) for line in options.draw.read_text().splitlines()]
        draw_rows(rows, options.draw.with_suffix(".svg"))
        return
    bandwidth = copy_bandwidth()
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dtype": options.dtype,
        "copy_TB_s": round(bandwidth / 1e12, 3),
    }
    print(machine)
    for case in default_cases():
        if options.only not in case.model:
            continue
        variants = itertools.product(options.backends.split(","), options.adapter_dtypes.split(","))
        for name, adapter_dtype in variants:
            row = measure(case, name, adapter_dtype, bandwidth, getattr(torch, options.dtype))
            ranks = ",".join(map(str, case.ranks))
            print(
                f"{case.model:13} r{ranks:10} {len(case.modules)} modules {case.num_tokens:5} rows "
                f"{case.popularity:9} {row['num_adapters']:4} adapters ({case.num_resident:4} res) "
                f"{name:7} {adapter_dtype:4} {row['us']:8.2f} us  "
                f"floor {row['floor_us']:7.2f}  x{row['ratio']}",
                flush=True,
            )
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps({**machine, **row}) + "\n")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
