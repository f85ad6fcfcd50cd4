"""Joins the worker ranks that share a model."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from loraplex.engine.errors import ConfigError

JOIN_TIMEOUT_S = 600.0
"""Longest wait for another rank: one may load its weights from a slow disk."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This worker's place among the ranks.

    Attributes:
        group: torch.distributed's group of all ranks; None if there is one rank.
        loader_group: the same ranks, for their loader threads, on the CPU.
    """

    worker_rank: int = 0
    world_size: int = 1
    group: Any = None
    loader_group: Any = None

    def least(self, value: int) -> int:
        """Returns the least value of all ranks, which all call this."""
        if self.group is None:
            return value
        tensor = torch.tensor(value, dtype=torch.int64)  # on the CPU, through gloo
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=self.group)
        return int(tensor)

    def sum_of_loaders(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the sum over all ranks, equal bit for bit on each of them.

        The loader threads of all ranks call this, in the same order.

        Args:
            values: float32 [n], on any device.
        """
        if self.loader_group is None:
            return values
        own = values.cpu()
        gathered = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(gathered, own, group=self.loader_group)
        return torch.stack(gathered).sum(dim=0).to(values.device)


def join_ranks(worker_rank: int, world_size: int, device: torch.device, store: str) -> Ranks:
    """Returns the group of all ranks once every rank has called this.

    Args:
        store: path of a file that all ranks of this engine name, and no other engine.

    Raises:
        ConfigError: a rank did not come, or PyTorch lacks the libraries.
    """
    if world_size == 1:
        return Ranks()
    on_gpu = device.type == "cuda"
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            init_method=f"file://{store}",
            rank=worker_rank,
            world_size=world_size,
            timeout=timedelta(seconds=JOIN_TIMEOUT_S),
            device_id=device if on_gpu else None,
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"worker {worker_rank} could not join the other ranks: {error}") from None
    timeout = timedelta(seconds=JOIN_TIMEOUT_S)
    loader_group = dist.new_group(backend="gloo", timeout=timeout)
    return Ranks(worker_rank, world_size, dist.group.WORLD, loader_group)
