"""The contract of op ``collective``: sums and gathers over the worker ranks that share a model.

A row-parallel product leaves a *partial sum* on each rank; the layer's output is their sum over
the ranks. All ranks call the same operators in the same order with equal sizes. Sums are
accumulated in float32 in the order of the ranks, so every rank gets the same bits. Nothing syncs
with the host, so what `supports_graphs` says may be captured in a CUDA graph.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from loraplex.backends.fused.contract import FusedOps

EMBEDDING, ATTENTION, MLP = range(3)
"""Who writes a partial sum: two calls in a row never use the same one."""
NUM_PARTIALS = 3


@dataclass(frozen=True, slots=True)
class CollectiveSpec:
    """Static sizes of one worker rank."""

    worker_rank: int
    world_size: int
    group: Any  # torch.distributed.ProcessGroup, the whole world
    device: torch.device
    dtype: torch.dtype
    hidden_size: int
    max_num_tokens: int  # rows of the largest step
    max_num_samples: int  # rows of the largest gather
    gather_width: int  # columns of one rank in the widest gather
    fused: FusedOps  # for backends that add and norm in a launch of their own


class CollectiveOp(Protocol):
    """One backend, made once a worker with a CollectiveSpec.

    Attributes:
        supports_graphs: whether calls may be captured in a CUDA graph and replayed.
    """

    name: str
    supports_graphs: bool

    def partial(self, num_tokens: int, role: int) -> torch.Tensor:
        """Returns the memory for a partial sum, [num_tokens, hidden_size], uninitialised.

        Args:
            role: EMBEDDING, ATTENTION or MLP; not that of the call before.
        """
        ...

    def all_reduce(self, partial: torch.Tensor, out: torch.Tensor) -> None:
        """Writes the sum over all ranks to `out`.

        Args:
            partial: from `partial`; its contents are lost.
            out: [T, hidden_size], contiguous.
        """
        ...

    def add_rms_norm(
        self, partial: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Adds the sum over all ranks to the residual and returns rms_norm(residual).

        A backend may keep the residual of each token on one rank alone: rows of other ranks then
        hold stale values, and only calls of this operator may read the residual.

        Args:
            partial: from `partial`; its contents are lost.
            residual: [T, hidden_size], contiguous, mutated.
            weight: [hidden_size].

        Returns:
            [T, hidden_size], contiguous, equal on all ranks; valid until the next call.
        """
        ...

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the columns of all ranks side by side.

        Args:
            x: [N, width], contiguous, width at most `gather_width`.

        Returns:
            [N, world_size * width], contiguous, equal on all ranks; valid until the next call.
        """
        ...
