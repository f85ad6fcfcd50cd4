"""The vectors of adapters in one Triton kernel, for GPUs."""

from dataclasses import dataclass

import numpy as np
import torch

from loraplex.backends.launch.buffers import BufferPool, PooledBuffer
from loraplex.backends.launch.triton import TritonLaunch
from loraplex.backends.launch.upload import ALIGN, Uploader
from loraplex.backends.lora.contract import LoRAGroup, LoRASpec, LoRATable
from loraplex.backends.lora.vectors.contract import VectorRows
from loraplex.backends.lora.vectors.kernels import vectors_kernel

HEADER_INTS = 4
BLOCK = 1024
"""Columns of a unit of work."""
MAX_PROGRAMS = 4096


@dataclass(frozen=True, slots=True)
class TritonVectorPlan:
    """The rows on the device. Read by kernels.py."""

    table: LoRATable
    meta: torch.Tensor  # int32
    num_rows: int | None  # None: a plan for graphs
    buffer: PooledBuffer | None  # owns `meta`; None: it is static


class TritonVectors:
    """VectorKernels."""

    def __init__(self, spec: LoRASpec) -> None:
        self._page_elems = spec.page_elems
        num_bytes = -(-4 * (HEADER_INTS + 2 * spec.max_num_tokens) // ALIGN) * ALIGN
        self._buffers = BufferPool(spec.device, num_bytes)
        self._static = torch.zeros(num_bytes, dtype=torch.uint8, device=spec.device)
        self._uploader = Uploader(spec.device)
        self._launches: dict[tuple[int, int, int], TritonLaunch] = {}
        self._table: LoRATable | None = None
        self._pool: torch.Tensor | None = None

    def plan(self, table: LoRATable, rows: VectorRows) -> TritonVectorPlan:
        buffer = self._buffers.take()
        self._upload(rows, buffer.tensor)
        return TritonVectorPlan(table, buffer.tensor.view(torch.int32), len(rows.rows), buffer)

    def plan_graph(self, table: LoRATable, rows: VectorRows) -> TritonVectorPlan:
        self._upload(rows, self._static)
        return TritonVectorPlan(table, self._static.view(torch.int32), None, None)

    def apply(
        self,
        plan: TritonVectorPlan,
        *,
        y: torch.Tensor,
        pool: torch.Tensor,
        layer: int,
        group: LoRAGroup,
    ) -> None:
        table = plan.table
        if table is not self._table or pool is not self._pool:
            self._launches.clear()  # they keep the addresses and strides of one table and one pool
            self._table, self._pool = table, pool
        key = (layer, group.modules[0], y.stride(0))
        launch = self._launches.get(key)
        if launch is None:
            launch = self._launches[key] = self._prepare(y, pool, table, layer, group)
        num_rows = y.shape[0] if plan.num_rows is None else plan.num_rows
        panels = sum(-(-out // BLOCK) for out in group.out_features)
        launch(min(num_rows * panels, MAX_PROGRAMS), y, plan.meta)

    def _upload(self, rows: VectorRows, out: torch.Tensor) -> None:
        header = np.array([len(rows.rows), 0, 0, 0], dtype=np.int32)
        meta = np.concatenate([header, rows.rows, rows.slots]).astype(np.int32, copy=False)
        self._uploader.upload({"meta": meta}, out=out)

    def _prepare(
        self, y: torch.Tensor, pool: torch.Tensor, table: LoRATable, layer: int, group: LoRAGroup
    ) -> TritonLaunch:
        gain, outs, starts = (
            table.gain_start,
            (*group.out_features, 0, 0),
            (*group.out_starts, 0, 0),
        )
        return TritonLaunch(
            vectors_kernel,
            (layer, y.stride(0), pool.stride(0), table.page_table.stride(0),
             gain.stride(0), gain.stride(2), gain.stride(1)),
            (pool, table.page_table, gain, table.shift_start),
            FIRST_MODULE=group.modules[0],
            NUM_MODULES=len(group.modules), OUT_0=outs[0], OUT_1=outs[1], OUT_2=outs[2],
            START_1=starts[1], START_2=starts[2], PAGE=self._page_elems, BLOCK=BLOCK,
            num_warps=4,
        )  # fmt: skip
