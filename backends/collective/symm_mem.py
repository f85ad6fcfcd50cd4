"""Backend ``symm_mem`` of op ``collective``: Triton kernels over torch's symmetric memory.

Each rank maps the buffers of all ranks. A row-parallel product writes its partial sum straight to
such a buffer; one kernel then adds the peers' partials and the residual, and norms. Small sums are
one-shot (a rank reads everything, one meeting of the ranks); large ones two-shot (a rank reduces
its share of the rows and writes it to all, two meetings). NVLink multicast is never used.

Why no rank overwrites what a peer still reads: a rank writes a partial of one role only after
the kernel of another role, and in that kernel it met the peer, which had then finished the kernel
that read the old partial. A peer writes normed rows only after it met this rank in the same
kernel, hence after this rank's readers of the old rows, which lie before on its stream.
"""

from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
import triton

from loraplex.backends.collective.contract import NUM_PARTIALS, CollectiveSpec
from loraplex.backends.collective.kernels import (
    gather_kernel,
    reduce_add_norm_kernel,
    reduce_kernel,
)
from loraplex.backends.launch.triton import TritonLaunch

MAX_PROGRAMS = 1024
"""Most programs of a launch: as many pairs of flags as this are kept for each peer."""

TWO_SHOT_BYTES = 1 << 20
"""Partial sums of at least this many bytes take the two-shot way, among more than two ranks."""

TWO_SHOT_BYTES_OF_TWO = 64 << 20
"""The same for two ranks, where one shot reads no more than two do (collectives_h100x2.jsonl)."""

GATHER_BLOCK = 2048
_ALIGN = 512


class SymmMemCollective:
    """One launch for each sum, norm included.

    Attributes:
        two_shot_bytes: sums of at least this many bytes take the two-shot way; equal on all ranks.
    """

    name = "symm_mem"
    supports_graphs = True

    @staticmethod
    def probe(spec: CollectiveSpec | None = None) -> str | None:
        """Returns None when usable, else the reason."""
        if not torch.cuda.is_available():
            return "it needs CUDA devices"
        if not dist.is_available() or find_spec("torch.distributed._symmetric_memory") is None:
            return "this build of PyTorch has no symmetric memory"
        if spec is None:
            return None
        if spec.device.type != "cuda":
            return f"it runs on CUDA devices, not on {spec.device.type}"
        if spec.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"it takes float16, bfloat16 and float32, not {spec.dtype}"
        index = spec.device.index or 0
        for peer in range(spec.world_size):
            if peer != index and not torch.cuda.can_device_access_peer(index, peer):
                return f"GPU {index} cannot read the memory of GPU {peer}"
        return None

    def __init__(self, spec: CollectiveSpec) -> None:
        self._spec = spec
        self.two_shot_bytes = TWO_SHOT_BYTES if spec.world_size > 2 else TWO_SHOT_BYTES_OF_TWO
        shapes = {
            "partials": (NUM_PARTIALS, spec.max_num_tokens, spec.hidden_size),
            "normed": (spec.max_num_tokens, spec.hidden_size),
            "gathered": (spec.max_num_samples, spec.world_size * spec.gather_width),
        }
        self._buffers, self._addresses, self._flags = _allocate(spec, shapes)
        self._partials = self._addresses["partials"].unbind()
        self._partial_bytes = self._buffers["partials"][0].nbytes
        self._options: dict[str, Any] = {"RANK": spec.worker_rank, "WORLD": spec.world_size}
        self._options |= {"MEET": True, "PDL": True, "launch_pdl": True}
        block = triton.next_power_of_2(spec.hidden_size)
        self._row_options = self._options | {
            "SIZE": spec.hidden_size, "BLOCK": block, "num_warps": min(16, max(1, block // 256)),
        }  # fmt: skip
        self._reduce = TritonLaunch(reduce_kernel, (0,), **self._row_options)
        self._norms: dict[tuple[bool, float], TritonLaunch] = {}
        self._gathers: dict[int, TritonLaunch] = {}

    def partial(self, num_tokens: int, role: int) -> torch.Tensor:
        return self._buffers["partials"][role, :num_tokens]

    def all_reduce(self, partial: torch.Tensor, out: torch.Tensor) -> None:
        num_rows = len(partial)
        self._reduce(
            min(num_rows, MAX_PROGRAMS), out, self._addresses_of(partial), self._flags,
            first_scalar=num_rows,
        )  # fmt: skip

    def add_rms_norm(
        self, partial: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        num_rows = len(partial)
        two_shot = self.is_two_shot(num_rows)
        normed = self._buffers["normed"][:num_rows] if two_shot else torch.empty_like(partial)
        share = -(-num_rows // self._spec.world_size) if two_shot else num_rows
        self._norm(two_shot, eps)(
            min(share, MAX_PROGRAMS), residual, weight, normed, self._addresses_of(partial),
            self._flags, self._addresses["normed"][0], first_scalar=num_rows,
        )  # fmt: skip
        return normed

    def is_two_shot(self, num_rows: int) -> bool:
        """Returns whether a sum of so many rows takes the two-shot way; equal on all ranks."""
        spec = self._spec
        num_bytes = num_rows * spec.hidden_size * spec.dtype.itemsize
        return num_bytes >= self.two_shot_bytes and num_rows >= spec.world_size

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        num_rows, width = x.shape
        columns = self._spec.world_size * width
        gathered = self._buffers["gathered"].view(-1)[: num_rows * columns]
        num_items = num_rows * -(-width // GATHER_BLOCK)
        self._gather(width)(
            min(num_items, MAX_PROGRAMS), x, self._addresses["gathered"][0], self._flags,
            first_scalar=num_rows,
        )  # fmt: skip
        return gathered.view(num_rows, columns)

    def _norm(self, two_shot: bool, eps: float) -> TritonLaunch:
        launch = self._norms.get((two_shot, eps))
        if launch is None:
            launch = self._norms[two_shot, eps] = TritonLaunch(
                reduce_add_norm_kernel, (0, eps), TWO_SHOT=two_shot, **self._row_options
            )
        return launch

    def _gather(self, width: int) -> TritonLaunch:
        launch = self._gathers.get(width)
        if launch is None:
            launch = self._gathers[width] = TritonLaunch(
                gather_kernel, (0,), WIDTH=width, BLOCK=GATHER_BLOCK, num_warps=8, **self._options
            )
        return launch

    def _addresses_of(self, partial: torch.Tensor) -> torch.Tensor:
        """Returns int64 [at least world_size], the partial's address on each rank."""
        buffer = self._buffers["partials"]
        offset = partial.data_ptr() - buffer.data_ptr()
        return self._partials[offset // self._partial_bytes]


def _allocate(
    spec: CollectiveSpec, shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
    """Takes one symmetric allocation for all buffers and the flags.

    Returns:
        The buffers by name; int64 [first dimension or 1, at least world_size], their addresses
        on each rank; int64 [world_size], the addresses of the flags.
    """
    import torch.distributed._symmetric_memory as symm_mem

    places: dict[str, int] = {}
    end = 4 * MAX_PROGRAMS * spec.world_size
    for name, shape in shapes.items():
        places[name] = -(-end // _ALIGN) * _ALIGN
        end = places[name] + _num_elems(shape) * spec.dtype.itemsize
    memory = symm_mem.empty(-(-end // _ALIGN) * _ALIGN, dtype=torch.uint8, device=spec.device)
    handle = symm_mem.rendezvous(memory, group=spec.group)
    memory.zero_()
    torch.cuda.synchronize(spec.device)
    dist.barrier(group=spec.group)  # no peer may raise a flag before it is zero
    bases = list(handle.buffer_ptrs)
    padded = bases + [0] * (len(bases) % 2)  # each row of addresses starts at 16 bytes
    buffers, addresses = {}, {}
    for name, shape in shapes.items():
        num_bytes = _num_elems(shape) * spec.dtype.itemsize
        start = places[name]
        buffers[name] = memory[start : start + num_bytes].view(spec.dtype).view(shape)
        count = shape[0] if len(shape) == 3 else 1
        step = num_bytes // count
        rows = [[base + start + i * step for base in padded] for i in range(count)]
        addresses[name] = torch.tensor(rows, dtype=torch.int64, device=spec.device)
    flags = torch.tensor(bases, dtype=torch.int64, device=spec.device)
    return buffers, addresses, flags


def _num_elems(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
