"""One rank of a test of op ``collective`` over gloo, run in a process of its own."""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from loraplex.backends.collective.contract import ATTENTION, EMBEDDING, MLP, CollectiveSpec
from loraplex.backends.collective.distributed import GlooCollective
from loraplex.backends.fused.contract import FusedSpec
from loraplex.backends.fused.torch_ops import TorchFused

SIZES = ((1, 8), (3, 24), (7, 64), (133, 40))
EPS = 1e-5


def inputs(rank: int, rows: int, hidden: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + rows)
    return torch.randn(rows, hidden, generator=generator)


def run_rank(rank: int, world_size: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    results = []
    for rows, hidden in SIZES:
        device = torch.device("cpu")
        op = GlooCollective(
            CollectiveSpec(
                worker_rank=rank,
                world_size=world_size,
                group=dist.group.WORLD,
                device=device,
                dtype=torch.float32,
                hidden_size=hidden,
                max_num_tokens=rows,
                max_num_samples=rows,
                gather_width=hidden,
                fused=TorchFused(FusedSpec(torch.float32, device, 8)),
            )
        )
        x = inputs(rank, rows, hidden)
        embedded = torch.empty(rows, hidden)
        partial = op.partial(rows, EMBEDDING)
        partial.copy_(x)
        op.all_reduce(partial, embedded)
        residual = embedded.clone()
        weight = torch.linspace(0.5, 1.5, hidden)
        normed = []
        for role in (ATTENTION, MLP):
            partial = op.partial(rows, role)
            partial.copy_(x)
            normed.append(op.add_rms_norm(partial, residual, weight, EPS))
        results.append((embedded, residual, *normed, op.all_gather(x)))
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
