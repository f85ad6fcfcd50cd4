"""How long a sum over the ranks takes, by size and way, beside the bytes that cross the link.

Each way sums a [rows, hidden] partial of every rank, adds the residual and norms, inside a CUDA
graph, as a decode step does. `nccl` is NCCL's all_reduce and the fused norm; `torch` is torch's own
two-shot operator over symmetric memory and the fused norm; `one_shot` and `two_shot` are op
``collective``'s kernel. Before a time is taken, the result is compared with a float32 sum, and the
ranks' results with each other bit for bit.

    python benchmarks/collectives.py --world-size 2 --out collectives.jsonl
"""

import argparse
import json
import os
import socket
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from loraplex.backends.collective.contract import ATTENTION, MLP, CollectiveOp, CollectiveSpec
from loraplex.backends.collective.distributed import NcclCollective
from loraplex.backends.collective.symm_mem import SymmMemCollective
from loraplex.backends.fused.contract import FusedOps, FusedSpec
from loraplex.backends.fused.triton_ops import TritonFused

CALLS = 40  # in one graph
REPLAYS = 30
EPS = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--hidden", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1, 3, 8, 16, 32, 64, 128, 256, 512, 2048]
    )
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    options = parser.parse_args()
    # NVLink multicast stays off in NCCL and in symmetric memory.
    os.environ.update(NCCL_NVLS_ENABLE="0", TORCH_SYMM_MEM_DISABLE_MULTICAST="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    mp.spawn(_run, args=(options,), nprocs=options.world_size, join=True)


def _run(rank: int, options: argparse.Namespace) -> None:
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group("nccl", rank=rank, world_size=options.world_size, device_id=device)
    fused = TritonFused(FusedSpec(torch.bfloat16, device, 128))
    for hidden in options.hidden:
        spec = CollectiveSpec(
            worker_rank=rank,
            world_size=options.world_size,
            group=dist.group.WORLD,
            device=device,
            dtype=torch.bfloat16,
            hidden_size=hidden,
            max_num_tokens=max(options.rows),
            max_num_samples=256,
            gather_width=64128,
            fused=fused,
        )
        ways = _ways(spec, fused)
        for rows in options.rows:
            _report(rank, options, _measure(spec, ways, rows))
        _report(rank, options, _gather_row(spec, ways))
    dist.destroy_process_group()


def _report(rank: int, options: argparse.Namespace, row: dict[str, Any]) -> None:
    """Rank 0 prints the line and appends it to --out."""
    if rank:
        return
    print(json.dumps(row), flush=True)
    if options.out:
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
"""(contents of the partial, residual, weight, role) -> normed rows."""


def _ways(spec: CollectiveSpec, fused: FusedOps) -> dict[str, Way]:
    nccl, symm = NcclCollective(spec), SymmMemCollective(spec)
    ways: dict[str, Way] = {"nccl": _through(nccl), "torch": _torch_two_shot(spec, fused)}
    for name, limit in (("one_shot", 1 << 62), ("two_shot", 0)):
        op = SymmMemCollective(spec)
        op.two_shot_bytes = limit
        ways[name] = _through(op)
    ways["gather_nccl"] = lambda x, r, w, role: nccl.all_gather(x)
    ways["gather_symm_mem"] = lambda x, r, w, role: symm.all_gather(x)
    return ways


def _through(op: CollectiveOp) -> Way:
    def run(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, role: int
    ) -> torch.Tensor:
        partial = op.partial(len(x), role)
        partial.copy_(x)  # stands for the product that writes the partial
        return op.add_rms_norm(partial, residual, weight, EPS)

    return run


def _torch_two_shot(spec: CollectiveSpec, fused: FusedOps) -> Way:
    import torch.distributed._symmetric_memory as symm_mem

    buffer = symm_mem.empty(
        spec.max_num_tokens, spec.hidden_size, dtype=spec.dtype, device=spec.device
    )
    symm_mem.rendezvous(buffer, group=spec.group)
    name = spec.group.group_name

    def run(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, role: int
    ) -> torch.Tensor:
        partial = buffer[: len(x)]
        partial.copy_(x)
        torch.ops.symm_mem.two_shot_all_reduce_(partial, "sum", name)
        return fused.add_rms_norm(partial, residual, weight, EPS)

    return run


def _measure(spec: CollectiveSpec, ways: dict[str, Way], rows: int) -> dict[str, Any]:
    hidden = spec.hidden_size
    row: dict[str, Any] = {
        "bench": "collectives", "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "world_size": spec.world_size, "rows": rows, "hidden": hidden, "dtype": "bfloat16",
        "KiB": rows * hidden * 2 >> 10, "calls": CALLS, "replays": REPLAYS,
    }  # fmt: skip
    copy = _time(lambda x, r, w, role: copy_alone(x), spec, rows)
    row["copy_us"] = round(copy, 2)
    for name in ("nccl", "torch", "one_shot", "two_shot"):
        _check(spec, ways[name], rows, name)
        row[f"{name}_us"] = round(_time(ways[name], spec, rows) - copy, 2)
    return row


def copy_alone(x: torch.Tensor) -> torch.Tensor:
    """The copy to the partial alone, which every way does: it is subtracted."""
    return torch.empty_like(x).copy_(x)


def _check(spec: CollectiveSpec, way: Way, rows: int, name: str) -> None:
    """Raises AssertionError unless the result is right, and equal on all ranks."""
    x, residual, weight = _inputs(spec, rows, seed=rows)
    for role in (ATTENTION, MLP, ATTENTION):
        old = residual.clone()
        y = way(x, residual, weight, role).clone()
        parts = x.new_empty(spec.world_size * rows, spec.hidden_size)
        dist.all_gather_into_tensor(parts, x)
        total = parts.view(spec.world_size, rows, -1).double().sum(0)
        everyone = y.new_empty(spec.world_size * rows, spec.hidden_size)
        dist.all_gather_into_tensor(everyone, y)
        by_rank = everyone.view(spec.world_size, rows, -1)
        assert all(torch.equal(by_rank[0], other) for other in by_rank), f"{name}: ranks differ"
        if role == ATTENTION and old is not None:
            expected = total + old.double()
            share = -(-rows // spec.world_size)
            mine = slice(spec.worker_rank * share, (spec.worker_rank + 1) * share)
            if name != "two_shot":
                mine = slice(0, rows)
            normed = expected * torch.rsqrt(expected.square().mean(-1, keepdim=True) + EPS)
            normed = normed * weight.double()
            error = (y[mine].double() - normed[mine]).norm() / normed[mine].norm().clamp(min=1e-9)
            assert error < 6e-3, f"{name}: rows {rows}: error {error}"


def _inputs(
    spec: CollectiveSpec, rows: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    own = torch.Generator(spec.device).manual_seed(seed * 100 + spec.worker_rank)
    shared = torch.Generator(spec.device).manual_seed(seed)
    options: dict[str, Any] = {"device": spec.device, "dtype": spec.dtype}
    x = torch.randn(rows, spec.hidden_size, generator=own, **options)
    residual = torch.randn(rows, spec.hidden_size, generator=shared, **options)
    weight = torch.rand(spec.hidden_size, generator=shared, **options) + 0.5
    return x, residual, weight


def _time(way: Way, spec: CollectiveSpec, rows: int) -> float:
    """Returns the median microseconds of a call, inside a CUDA graph of CALLS calls."""
    x, residual, weight = _inputs(spec, rows, seed=rows)
    roles = [ATTENTION, MLP]
    for role in roles:
        way(x, residual, weight, role)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(CALLS):
            way(x, residual, weight, roles[call % 2])
    return _replay(graph)


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(REPLAYS):
        dist.barrier()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / CALLS)
    return statistics.median(times)


def _gather_row(spec: CollectiveSpec, ways: dict[str, Way]) -> dict[str, Any]:
    rows = 64
    x = torch.randn(rows, spec.gather_width, device=spec.device, dtype=spec.dtype)
    row: dict[str, Any] = {
        "bench": "gather",
        "rows": rows,
        "width": spec.gather_width,
        "world_size": spec.world_size,
    }
    results = []
    for name in ("gather_nccl", "gather_symm_mem"):
        results.append(ways[name](x, x, x, 0).clone())
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                ways[name](x, x, x, 0)
        row[f"{name}_us"] = round(_replay(graph), 2)
    assert torch.equal(*results), "the gathers differ"
    return row


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
