"""Backend ``triton`` of op ``lora``: SGMV (Punica, arXiv 2310.18547) over the page pool.

Two launches a group of projections: shrink, with K split where few tiles would leave the chip
idle, and expand, which sums the splits in order and adds to y. On Hopper the two overlap through
programmatic dependent launch: expand fetches its weights while shrink still runs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from triton import knobs

from loraplex.backends.lora.contract import LoRABatch, LoRAGroup, LoRASpec, LoRATable, row_stride
from loraplex.backends.lora.kernels.sgmv import expand_kernel, shrink_kernel
from loraplex.backends.lora.tiles import largest_ranks, make_tiles, split_ranks

MAX_SPLITS = 16
_BF16 = torch.bfloat16
MIN_SPLIT_K = 256


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Block sizes of one regime: few rows an adapter (decode) or many (prefill)."""

    m: int
    k: int
    r: int
    n: int
    shrink_warps: int
    shrink_stages: int
    expand_warps: int


_DECODE = _Blocks(m=16, k=256, r=16, n=256, shrink_warps=4, shrink_stages=3, expand_warps=4)
_PREFILL = _Blocks(m=64, k=64, r=16, n=128, shrink_warps=4, shrink_stages=4, expand_warps=4)


class TritonSGMV:
    name = "triton"

    @staticmethod
    def probe(spec: LoRASpec | None = None) -> str | None:
        """None when usable, else the reason."""
        interpreted = knobs.runtime.interpret
        if not interpreted and not torch.cuda.is_available():
            return "it needs a CUDA device"
        if spec is None:
            return None
        if interpreted:
            return "Triton's interpreter gets bfloat16 wrong" if spec.dtype is _BF16 else None
        if spec.device.type != "cuda":
            return f"it needs a CUDA device, not {spec.device.type}"
        return None

    def __init__(self, spec: LoRASpec) -> None:
        self._spec = spec
        is_cuda = spec.device.type == "cuda"
        self._num_programs = 4 * _num_processors(spec.device)
        self._pdl = is_cuda and torch.cuda.get_device_capability(spec.device)[0] >= 9
        self._launch_options: dict[str, Any] = {"launch_pdl": True} if self._pdl else {}
        max_rows = spec.max_num_tokens
        self._v = torch.empty(
            max(max_rows, 512) * 3 * spec.max_rank, dtype=torch.float32, device=spec.device
        )
        max_items = max_rows * -(-spec.max_rank // 16)
        self._tiles = torch.empty((max_rows, 4), dtype=torch.int32, device=spec.device)
        self._items = torch.empty((max_items, 4), dtype=torch.int32, device=spec.device)
        self._blocks = _DECODE
        self._num_tiles = self._num_items = 0
        self._v_row_stride = 3 * spec.max_rank

    def plan(self, *, table: LoRATable, batch: LoRABatch) -> None:
        if batch.is_empty:
            return
        starts = np.asarray(batch.segment_starts, dtype=np.int32)
        slots = np.asarray(batch.segment_slots, dtype=np.int32)
        many_rows = starts[-1] > 16 * len(slots)
        self._blocks = _PREFILL if many_rows else _DECODE
        tiles = make_tiles(starts, slots, self._blocks.m)
        slot_ranks = largest_ranks(table.host_rank.numpy(), slots)
        items = split_ranks(tiles, slot_ranks, self._blocks.r)
        self._num_tiles, self._num_items = len(tiles), len(items)
        self._tiles[: len(tiles)].copy_(torch.from_numpy(tiles), non_blocking=True)
        self._items[: len(items)].copy_(torch.from_numpy(items), non_blocking=True)

    def apply(
        self,
        *,
        y: torch.Tensor,
        x: torch.Tensor,
        pool: torch.Tensor,
        layer: int,
        group: LoRAGroup,
        table: LoRATable,
        batch: LoRABatch,
    ) -> None:
        if batch.is_empty:
            return
        num_modules = len(group.modules)
        first = group.modules[0]
        rank, page_elems = table.rank[layer, first], pool.shape[2]
        num_rows = batch.segment_starts[-1]
        splits, k_per_split = self._split_k(group.in_features, num_modules, num_rows)
        strides = (num_rows * self._v_row_stride, self._v_row_stride, self._spec.max_rank)
        blocks = self._blocks
        shrink_kernel[(self._num_items * num_modules, splits)](
            x, self._v, pool[layer], self._items, batch.token_order, table.page_table,
            rank, table.a_start[layer, first],
            x.stride(0), table.page_table.stride(0), table.rank.shape[2], *strides, k_per_split,
            K=group.in_features, K_ROW=row_stride(group.in_features), NUM_MODULES=num_modules,
            PAGE=page_elems, BLOCK_M=blocks.m, BLOCK_K=blocks.k, BLOCK_R=blocks.r, PDL=self._pdl,
            num_warps=blocks.shrink_warps, num_stages=blocks.shrink_stages, **self._launch_options,
        )  # fmt: skip
        outs = (*group.out_features, 0, 0)[:3]
        columns = (*group.out_starts, 0, 0)[:3]
        num_blocks = sum(-(-out // blocks.n) for out in outs)
        expand_kernel[(num_blocks, self._num_tiles)](
            y, self._v, pool[layer], self._tiles, batch.token_order, table.page_table,
            rank, table.b_start[layer, first], table.scale[layer, first],
            y.stride(0), table.page_table.stride(0), table.rank.shape[2], *strides,
            OUT_0=outs[0], OUT_1=outs[1], OUT_2=outs[2], PAGE=page_elems,
            START_1=columns[1], START_2=columns[2], SPLITS=splits,
            BLOCK_M=blocks.m, BLOCK_N=blocks.n, BLOCK_R=blocks.r, PDL=self._pdl,
            num_warps=blocks.expand_warps, num_stages=1, **self._launch_options,
        )  # fmt: skip

    def _split_k(self, in_features: int, num_modules: int, num_rows: int) -> tuple[int, int]:
        """The number of splits, a power of two, and the input features of each."""
        wanted = self._num_programs // (self._num_items * num_modules)
        room = self._v.numel() // (num_rows * self._v_row_stride)
        most = min(wanted, room, MAX_SPLITS, in_features // MIN_SPLIT_K)
        splits = 1 << max(0, most.bit_length() - 1)
        block = self._blocks.k
        return splits, -(-in_features // (splits * block)) * block


def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count
