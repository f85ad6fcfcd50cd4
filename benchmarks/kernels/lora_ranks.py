"""Compares ways to split adapters over the worker ranks: a layer's LoRA kernels and collectives.

`whole` is what the engine does: A of column-parallel layers and B of row-parallel ones are whole on
each rank, and the adapters' part is added before the sum over the ranks. `slices` splits that sum
over tokens: between its two halves a rank does its own tokens' B of the row-parallel layer, norm
and A of the next layers, and the narrow products ride with the rows. `split` is S-LoRA's way (arXiv
2311.03285, section 6): A of column-parallel layers is split by rank, B of row-parallel ones by
output, and the narrow products are gathered, which also splits the memory that an adapter takes.

`slices` and `split` are stand-ins made of today's kernels: their launches, bytes and meetings of
the ranks are right, their results are not. The base model's products are left out.

    python benchmarks/kernels/lora_ranks.py --world-size 2 --out lora_ranks.jsonl
"""

import argparse
import json
import os
import socket
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lora_kernels import ALL, QKVO, Case, Model, Setup, make_batch, rows_of

from loraplex.backends.collective.contract import ATTENTION, MLP, CollectiveSpec
from loraplex.backends.collective.symm_mem import SymmMemCollective
from loraplex.backends.fused.contract import FusedSpec
from loraplex.backends.fused.triton_ops import TritonFused
from loraplex.backends.lora.contract import LoRAGroup, LoRAOp, LoRAPlan
from loraplex.backends.registry import resolve
from loraplex.entrypoints.bench.gpu_timing import capture, copy_bandwidth
from loraplex.memory.adapter_layout import ModuleShape

REPLAYS = 30
LAYERS = 8
EPS = 1e-5
SIZES = {"llama-3-8b": Model(4096, 1024, 14336), "llama-2-70b": Model(8192, 1024, 28672)}
EDGES = ((ATTENTION, (3,), (4, 5)), (MLP, (6,), (0, 1, 2)))
"""Role of the partial sum, modules before it and modules behind it."""


@dataclass(frozen=True)
class Shard(Model):
    """One rank's part of a model. `row_share` divides the outputs of o and down."""

    world_size: int = 1
    row_share: int = 1

    @property
    def shapes(self) -> tuple[ModuleShape, ...]:
        hidden, n, out = self.hidden, self.world_size, self.hidden // self.row_share
        columns = [hidden // n, self.kv, self.kv]
        return (
            *(ModuleShape(hidden, width) for width in columns),
            ModuleShape(hidden // n, out),
            *(ModuleShape(hidden, self.intermediate // n) for _ in range(2)),
            ModuleShape(self.intermediate // n, out),
        )


def cases() -> list[Case]:
    decode = [
        Case("llama-3-8b", (16,), ALL, 64, popularity, num_layers=LAYERS)
        for popularity in ("identical", "distinct")
    ]
    crowded = [
        Case("llama-2-70b", (64,), QKVO, 100, "distinct", num_layers=LAYERS),
        Case("llama-3-8b", (64,), ALL, 64, "distinct", num_layers=LAYERS),
    ]
    prefill = [
        Case("llama-3-8b", (16,), ALL, 4096, "runs-8", num_layers=LAYERS),
        Case("llama-2-70b", (64,), QKVO, 4096, "runs-8", num_layers=LAYERS),
    ]
    return [*decode, *crowded, *prefill]


@dataclass
class Half:
    """A LoRA op with a plan for some rows; `ready` is False for a group that nothing adapts."""

    op: LoRAOp
    plan: LoRAPlan
    setup: Setup

    def group(self, modules: tuple[int, ...]) -> LoRAGroup | None:
        return next((g for g in self.setup.groups if g.modules == modules), None)

    def shrink(self, x: torch.Tensor, layer: int, modules: tuple[int, ...]) -> None:
        if (group := self.group(modules)) is not None:
            self.op.shrink(self.plan, x=x, pool=self.setup.pool, layer=layer, group=group)

    def expand(self, y: torch.Tensor, layer: int, modules: tuple[int, ...]) -> None:
        if (group := self.group(modules)) is not None:
            self.op.expand(self.plan, y=y, pool=self.setup.pool, layer=layer, group=group)


def make_half(setup: Setup, rows: list[int]) -> Half:
    op = resolve("lora", "hybrid").make(setup.spec())
    batch: dict[str, Any] = {"table": setup.table, "batch": make_batch(rows)}
    if len(rows) <= op.max_graph_rows:
        return Half(op, op.plan_graph(**batch, kind=op.kind_of(**batch)), setup)
    return Half(op, op.plan(**batch), setup)


class Ways:
    """The three ways over one case. Each runs one layer."""

    def __init__(self, case: Case, rank: int, world_size: int) -> None:
        device, dtype = torch.device("cuda", rank), torch.bfloat16
        self.case, self.world_size = case, world_size
        size, n = SIZES[case.model], world_size
        self.model = Shard(size.hidden, max(size.kv // n, 128), size.intermediate, n)
        self.rows = rows_of(case)
        self.share = -(-len(self.rows) // n)
        self.own = self.rows[rank * self.share :][: self.share]
        self.fused = TritonFused(FusedSpec(dtype, device, 128))
        narrow = 2 * 3 * max(case.ranks)  # float32 in units of bf16
        self.collective = SymmMemCollective(
            CollectiveSpec(
                worker_rank=rank,
                world_size=n,
                group=dist.group.WORLD,
                device=device,
                dtype=dtype,
                hidden_size=size.hidden,
                max_num_tokens=len(self.rows),
                max_num_samples=len(self.rows),
                gather_width=size.hidden + narrow,
                fused=self.fused,
            )
        )
        setup = Setup(case, dtype, device, self.model)
        self.full, self.sliced = make_half(setup, self.rows), make_half(setup, self.own)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, dtype=dtype, device=device)

        self.x = {m: random(len(self.rows), self.model.shapes[m[0]].in_features)
                  for _, before, after in EDGES for m in (before, after)}  # fmt: skip
        self.y = {
            after: random(len(self.rows), sum(self.model.shapes[m].out_features for m in after))
            for _, _, after in EDGES
        }
        self.residual, self.weight = random(len(self.rows), size.hidden), random(size.hidden)
        self.own_rows = random(self.share, size.hidden)
        self.payload = random(self.share, size.hidden + narrow)
        self.narrow = random(len(self.rows), narrow)

    @cached_property
    def split(self) -> tuple[Half, Half]:
        """S-LoRA's shards: with B of row-parallel layers split, and with A of the others split."""
        case, n, model = self.case, self.world_size, self.model
        shard = Shard(model.hidden, model.kv, model.intermediate, n, n)
        ranks = tuple(-(-rank // n) for rank in case.ranks)
        parts = [Case(case.model, r, case.modules, case.num_tokens, case.popularity,
                      num_layers=case.num_layers) for r in (case.ranks, ranks)]  # fmt: skip
        device = self.weight.device
        first, second = (Setup(part, self.weight.dtype, device, shard) for part in parts)
        return make_half(first, self.rows), make_half(second, self.rows)

    def run_whole(self, layer: int) -> None:
        for role, before, after in EDGES:
            partial = self.collective.partial(len(self.rows), role)
            self.full.shrink(self.x[before], layer, before)
            self.full.expand(partial, layer, before)
            normed = self.collective.add_rms_norm(partial, self.residual, self.weight, EPS)
            self.full.shrink(normed, layer, after)
            self.full.expand(self.y[after], layer, after)

    def run_slices(self, layer: int) -> None:
        for role, before, after in EDGES:
            partial = self.collective.partial(len(self.rows), role)
            self.full.shrink(self.x[before], layer, before)
            self.collective.all_reduce(partial[: self.share], self.own_rows)
            rows = self.own_rows[: len(self.own)]
            self.sliced.expand(rows, layer, before)
            normed = self.fused.rms_norm(rows, self.weight, EPS)
            self.sliced.shrink(normed, layer, after)
            self.collective.all_gather(self.payload)
            self.full.expand(self.y[after], layer, after)

    def run_split(self, layer: int) -> None:
        by_output, by_rank = self.split
        for role, before, after in EDGES:
            partial = self.collective.partial(len(self.rows), role)
            by_output.shrink(self.x[before], layer, before)
            self._gather_narrow(before, by_output, 1)
            by_output.expand(partial, layer, before)
            normed = self.collective.add_rms_norm(partial, self.residual, self.weight, EPS)
            by_rank.shrink(normed, layer, after)
            self._gather_narrow(after, by_rank, self.world_size)
            by_output.expand(self.y[after], layer, after)

    def _gather_narrow(self, modules: tuple[int, ...], half: Half, parts: int) -> None:
        if half.group(modules) is not None:
            width = 2 * len(modules) * -(-max(self.case.ranks) // parts)
            self.collective.all_gather(
                self.narrow.view(-1)[: len(self.rows) * width].view(-1, width)
            )

    def num_bytes(self, way: str) -> int:
        """Returns the bytes of adapters' weights that one rank reads in a layer."""
        everyone, own = (
            sum(self.case.ranks[slot % len(self.case.ranks)] for slot in set(rows))
            for rows in (self.rows, self.own)
        )
        total = 0
        for module in self.case.modules:
            shape, is_row = self.model.shapes[module], module in (3, 6)
            whole, cut = (shape.out_features, shape.in_features)
            if not is_row:
                whole, cut = cut, whole
            shares = {"whole": everyone, "slices": own, "split": everyone / self.world_size}
            total += int(2 * (cut * everyone + whole * shares[way]))
        return total

    def adapter_bytes(self, way: str) -> int:
        """Returns the bytes of one adapter that a rank keeps for one layer."""
        shapes = [(self.model.shapes[m], m in (3, 6)) for m in self.case.modules]
        whole = sum(s.out_features if is_row else s.in_features for s, is_row in shapes)
        cut = sum(s.in_features if is_row else s.out_features for s, is_row in shapes)
        share = self.world_size if way == "split" else 1
        return 2 * max(self.case.ranks) * (cut + whole // share)


def measure(case: Case, rank: int, world_size: int, bandwidth: float) -> dict[str, Any]:
    ways = Ways(case, rank, world_size)
    row: dict[str, Any] = {
        "bench": "lora_ranks", "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "world_size": world_size, "model": case.model, "rank": max(case.ranks),
        "modules": len(case.modules), "rows": case.num_tokens, "popularity": case.popularity,
        "layers": case.num_layers, "replays": REPLAYS, "copy_TB_per_s": round(bandwidth / 1e12, 2),
    }  # fmt: skip
    runs: dict[str, Callable[[int], None]] = {
        "whole": ways.run_whole, "slices": ways.run_slices, "split": ways.run_split
    }  # fmt: skip
    for name, run in runs.items():
        row[f"{name}_us"] = round(_time(run, case.num_layers), 2)
        row[f"{name}_floor_us"] = round(ways.num_bytes(name) / bandwidth * 1e6, 2)
        row[f"{name}_adapter_KiB_a_layer"] = ways.adapter_bytes(name) >> 10
    return row


def _time(run: Callable[[int], None], num_layers: int) -> float:
    """Returns the median microseconds of one layer, in a CUDA graph of all of them."""

    def run_all() -> None:
        for layer in range(num_layers):
            run(layer)

    graph = capture(run_all)
    times = []
    for _ in range(REPLAYS):
        dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / num_layers)
    return statistics.median(times)


def _run(rank: int, options: argparse.Namespace) -> None:
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group("nccl", rank=rank, world_size=options.world_size, device_id=device)
    bandwidth = copy_bandwidth()
    for case in cases():
        if options.model and case.model != options.model:
            continue
        row = measure(case, rank, options.world_size, bandwidth)
        torch.cuda.empty_cache()
        if rank == 0:
            print(json.dumps(row), flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--model", choices=SIZES, help="the cases of this model alone")
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    options = parser.parse_args()
    # NVLink multicast stays off in NCCL and in symmetric memory.
    os.environ.update(NCCL_NVLS_ENABLE="0", TORCH_SYMM_MEM_DISABLE_MULTICAST="1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    mp.spawn(_run, args=(options,), nprocs=options.world_size, join=True)


if __name__ == "__main__":
    main()
