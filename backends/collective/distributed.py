"""Backends ``nccl`` and ``gloo`` of op ``collective``: torch.distributed's own operators."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from loraplex.backends.collective.contract import CollectiveSpec
from loraplex.backends.collective.errors import RankLostError


class DistributedCollective:
    """Sums by all_reduce, then adds and norms by op ``fused``."""

    name: str
    device_type: str
    supports_graphs: bool

    @classmethod
    def probe(cls, spec: CollectiveSpec | None = None) -> str | None:
        """Returns None when usable, else the reason."""
        if not dist.is_available():
            return "this build of PyTorch has no torch.distributed"
        if not dist.is_backend_available(cls.name):
            return f"this build of PyTorch has no {cls.name}"
        if cls.device_type == "cuda" and not torch.cuda.is_available():
            return "it needs a CUDA device"
        if spec is not None and spec.device.type != cls.device_type:
            return f"it runs on {cls.device_type}, not on {spec.device.type}"
        return None

    def __init__(self, spec: CollectiveSpec) -> None:
        self._spec = spec

    def partial(self, num_tokens: int, role: int) -> torch.Tensor:
        spec = self._spec
        return torch.empty(num_tokens, spec.hidden_size, dtype=spec.dtype, device=spec.device)

    def all_reduce(self, partial: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(self._sum(partial))

    def add_rms_norm(
        self, partial: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        total = self._sum(partial)
        return self._spec.fused.add_rms_norm(total, residual, weight, eps)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        spec = self._spec
        num_rows, width = x.shape
        gathered = x.new_empty(spec.world_size * num_rows, width)
        with _peers():
            dist.all_gather_into_tensor(gathered, x, group=spec.group)
        by_rank = gathered.view(spec.world_size, num_rows, width)
        return by_rank.transpose(0, 1).reshape(num_rows, spec.world_size * width)

    def _sum(self, partial: torch.Tensor) -> torch.Tensor:
        """Sums over the ranks, in place where the backend can."""
        with _peers():
            dist.all_reduce(partial, group=self._spec.group)
        return partial


class GlooCollective(DistributedCollective):
    name = "gloo"
    device_type = "cpu"
    supports_graphs = False

    def _sum(self, partial: torch.Tensor) -> torch.Tensor:
        total = partial.float()  # gloo adds 16-bit numbers with a rounding each
        with _peers():
            dist.all_reduce(total, group=self._spec.group)
        return total.to(partial.dtype)


class NcclCollective(DistributedCollective):
    name = "nccl"
    device_type = "cuda"
    supports_graphs = True


@contextmanager
def _peers() -> Iterator[None]:
    """Raises RankLostError where a peer closed the connection or answers no more."""
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError of this rank's own
        raise
    except RuntimeError as error:
        raise RankLostError(f"a worker rank is gone: {str(error).splitlines()[0]}") from error
