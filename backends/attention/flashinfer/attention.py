"""Backend ``flashinfer`` of op ``attention``: flashinfer's kernels over the page pool, in place.

Decode rows and prefill rows are two launches. Decode splits long sequences over the GPU. Prefill
takes tiles of queries (fa3 on Hopper, fa2 elsewhere and over pages in e4m3, which fa3 reads only
for queries in e4m3).

A CUDA graph of decode is captured once for each number of rows. The library then plans for the
largest grid that number can need. The kernels read lengths, splits and pages from static buffers,
where each graph plan of as many rows writes them at the same places.
"""

import logging
from dataclasses import dataclass, fields
from typing import Any

import torch

from loraplex.backends.attention.contract import AttentionBatch, AttentionSpec
from loraplex.backends.attention.flashinfer.jit import library_reason, missing_reason
from loraplex.backends.attention.flashinfer.modules import (
    Module,
    Workspace,
    decode_kind,
    make_module,
)
from loraplex.backends.attention.paged_rows import PagedRows, paged_rows
from loraplex.backends.attention.self_test import self_test, self_test_spec
from loraplex.backends.launch.buffers import BufferPool
from loraplex.backends.launch.upload import ALIGN, Uploader

logger = logging.getLogger("loraplex")

HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)
PAGE_DTYPES = (*DTYPES, torch.float8_e4m3fn)

MAX_BLOCKS_PER_SM = 32
MIN_QUERY_TILE, MAX_QUERY_TILE = 16, 128
INT_SLACK_BYTES = 1 << 18
"""For what `_int_bytes` does not count: alignment, scalars, arrays with an entry an SM."""

LIBRARY_ERRORS = (ImportError, OSError, RuntimeError, ValueError, TypeError, AttributeError)


@dataclass(frozen=True, slots=True)
class _Launch:
    """Consecutive sequences that one module serves."""

    module: Module
    workspace: Workspace
    plan_info: Any
    tokens: slice  # rows of q and out
    rows: dict[str, torch.Tensor]  # the fields of PagedRows on the device


@dataclass(frozen=True, slots=True)
class FlashInferPlan:
    launches: list[_Launch]


class FlashInferAttention:
    """Attributes:
        prefill_kind: "fa2" or "fa3".

    Args:
        prefill_kind: None takes the best that can be loaded or built.
        decodes_by: "cuda-cores" or "fa2"; None takes the faster one, see `decode_kind`.
    """

    name = "flashinfer"
    supports_graphs = True

    def __init__(
        self, spec: AttentionSpec, prefill_kind: str | None = None, decodes_by: str | None = None
    ) -> None:
        self._spec = spec
        decodes_by = decodes_by or decode_kind(spec)
        self._decode = make_module(spec, decodes_by, causal=False)
        self.prefill_kind, self._prefill = _make_prefill(spec, prefill_kind)
        num_floats = max(_decode_float_bytes(spec, decodes_by), _prefill_float_bytes(spec))
        self._floats = _bytes(spec, num_floats)
        self._decode_ints = BufferPool(spec.device, _int_bytes(spec, spec.max_num_seqs))
        self._prefill_ints = BufferPool(spec.device, _int_bytes(spec, spec.max_num_tokens))
        self._uploader = Uploader(spec.device)
        self._graph_workspace = Workspace(
            self._floats, _bytes(spec, self._decode_ints.num_bytes), None
        )
        self._graph_rows = _bytes(spec, _row_bytes(spec))
        self._graph_infos: dict[int, tuple[int, ...]] = {}  # by number of rows

    @classmethod
    def probe(cls, spec: AttentionSpec | None = None) -> str | None:
        is_cuda = torch.cuda.is_available() if spec is None else spec.device.type == "cuda"
        if not is_cuda:
            return "it needs a CUDA GPU"
        reason = library_reason()
        if reason is not None or spec is None:
            return reason
        try:
            return _spec_reason(spec) or self_test(cls(self_test_spec(spec)), spec)
        except LIBRARY_ERRORS as error:
            return f"its self-test failed: {str(error).strip()[:500]}"

    @property
    def workspace_bytes(self) -> int:
        """Device memory that the op keeps."""
        ints = self._decode_ints.total_bytes + self._prefill_ints.total_bytes
        static = self._graph_workspace.ints.numel() + self._graph_rows.numel()
        return self._floats.numel() + ints + static

    def plan(self, batch: AttentionBatch) -> FlashInferPlan:
        decodes, total = batch.num_decodes, len(batch.query_lens)
        launches = []
        if decodes:
            launches.append(self._plan_eager(self._decode, self._decode_ints, batch, 0, decodes))
        if decodes < total:
            launches.append(
                self._plan_eager(self._prefill, self._prefill_ints, batch, decodes, total)
            )
        return FlashInferPlan(launches)

    def plan_graph(self, batch: AttentionBatch, num_rows: int) -> FlashInferPlan:
        num_seqs = len(batch.query_lens)
        if batch.num_decodes != num_seqs:
            raise ValueError(
                f"CUDA graphs are for decodes: {num_seqs - batch.num_decodes} sequences prefill"
            )
        if not num_seqs <= num_rows <= self._spec.max_num_seqs:
            raise ValueError(
                f"{num_seqs} sequences do not fit {num_rows} rows, or those pass max_num_seqs "
                f"({self._spec.max_num_seqs})"
            )
        block, workspace = self._spec.block_tokens, self._graph_workspace
        rows = paged_rows(batch, 0, num_seqs, block, num_padding=num_rows - num_seqs)
        info = self._decode.plan(workspace, rows, for_graph=True)
        if self._graph_infos.setdefault(num_rows, tuple(info)) != tuple(info):
            raise RuntimeError(
                f"flashinfer plans {num_rows} rows otherwise than when their graph was captured: "
                "this version cannot be replayed"
            )
        launch = self._make_launch(self._decode, workspace, info, rows, 0, out=self._graph_rows)
        return FlashInferPlan([launch])

    def run(
        self, plan: FlashInferPlan, *, q: torch.Tensor, kv: torch.Tensor, out: torch.Tensor
    ) -> None:
        # Views, made anew each time: a kept one would keep the pool on which sizes are measured.
        k, v = kv[:, 0], kv[:, 1]
        launches = plan.launches
        for launch in launches:
            if len(launches) == 1:  # of all tokens
                some_q, some_out = q, out
            else:
                some_q, some_out = q[launch.tokens], out[launch.tokens]
            launch.module.run(
                launch.workspace, launch.plan_info, launch.rows, some_q, k, v, some_out
            )

    def _plan_eager(
        self, module: Module, ints: BufferPool, batch: AttentionBatch, start: int, end: int
    ) -> _Launch:
        rows = paged_rows(batch, start, end, self._spec.block_tokens)
        buffer = ints.take()
        workspace = Workspace(self._floats, buffer.tensor, buffer)
        info = module.plan(workspace, rows, for_graph=False)
        # Sequences before `start` are decodes of one token each.
        return self._make_launch(module, workspace, info, rows, start)

    def _make_launch(
        self,
        module: Module,
        workspace: Workspace,
        plan_info: Any,
        rows: PagedRows,
        first_token: int,
        out: torch.Tensor | None = None,
    ) -> _Launch:
        # page_ids come last: all else then lies at places that depend on the number of rows alone.
        arrays = {field.name: getattr(rows, field.name) for field in fields(rows)}
        tokens = slice(first_token, first_token + int(rows.query_starts[-1]))
        on_device = self._uploader.upload(arrays, out=out)
        return _Launch(module, workspace, plan_info, tokens, on_device)


def _bytes(spec: AttentionSpec, num_bytes: int) -> torch.Tensor:
    return torch.zeros(num_bytes, dtype=torch.uint8, device=spec.device)


def _make_prefill(spec: AttentionSpec, kind: str | None) -> tuple[str, Module]:
    if kind is not None:
        return kind, make_module(spec, kind, causal=True)
    if _may_use_fa3(spec):
        reason = missing_reason(spec, "fa3")
        if reason is None:
            try:
                return "fa3", make_module(spec, "fa3", causal=True)
            except LIBRARY_ERRORS as error:
                reason = str(error).strip()[-500:]
        logger.warning("flashinfer's fa3 kernels are not used for prefill: %s", reason)
    return "fa2", make_module(spec, "fa2", causal=True)


def _may_use_fa3(spec: AttentionSpec) -> bool:
    is_hopper = torch.cuda.get_device_capability(spec.device)[0] == 9
    return is_hopper and spec.page_dtype is spec.dtype


def _spec_reason(spec: AttentionSpec) -> str | None:
    if torch.cuda.get_device_capability(spec.device)[0] < 8:
        return "it needs compute capability 8.0"
    if spec.dtype not in DTYPES:
        return f"it takes fp16 and bf16, not {spec.dtype}"
    if spec.page_dtype not in PAGE_DTYPES:
        return f"it reads pages of fp16, bf16 and e4m3, not {spec.page_dtype}"
    if spec.head_dim not in HEAD_DIMS:
        return f"head_dim {spec.head_dim} is none of {HEAD_DIMS}"
    if spec.num_heads % spec.num_kv_heads:
        return f"{spec.num_heads} query heads cannot share {spec.num_kv_heads} KV heads evenly"
    reason = missing_reason(spec, decode_kind(spec))
    if reason is None and missing_reason(spec, "fa2") is not None:
        # Prefill falls back to fa2, so fa2 or fa3 must be there.
        reason = missing_reason(spec, "fa3" if _may_use_fa3(spec) else "fa2")
    return reason


def num_multiprocessors(spec: AttentionSpec) -> int:
    """Returns the SMs of the spec's GPU."""
    return torch.cuda.get_device_properties(spec.device).multi_processor_count


def _partial_bytes(spec: AttentionSpec, num_tiles: int, tile: int) -> int:
    """Returns the bytes of tiles' fp32 outputs and log-sum-exps, each for all heads."""
    return spec.num_heads * num_tiles * tile * (spec.head_dim + 1) * 4 + 2 * ALIGN


def _decode_float_bytes(spec: AttentionSpec, kind: str) -> int:
    """Returns the scratch of a decode step: its splits are as many as the GPU takes at once, or one
    a row."""
    num_sms, group = num_multiprocessors(spec), spec.num_heads // spec.num_kv_heads
    if kind == "cuda-cores":
        return _partial_bytes(spec, -(-MAX_BLOCKS_PER_SM * num_sms // spec.num_kv_heads), 1)
    tile = MIN_QUERY_TILE
    if group > MIN_QUERY_TILE:
        tile = MAX_QUERY_TILE if group > 64 and spec.head_dim < 256 else 64
    num_tiles = -(-spec.max_num_seqs * group // tile) + spec.max_num_seqs
    return _partial_bytes(spec, max(num_tiles, 2 * num_sms // spec.num_kv_heads), tile)


def _prefill_float_bytes(spec: AttentionSpec) -> int:
    """Returns the scratch of a prefill: it splits sequences into at most two tiles an SM."""
    num_tiles = 2 * num_multiprocessors(spec) // spec.num_kv_heads
    return _partial_bytes(spec, num_tiles, MAX_QUERY_TILE)


def _int_bytes(spec: AttentionSpec, max_num_rows: int) -> int:
    """Returns the bytes of a plan of at most `max_num_rows` query rows.

    fa2 keeps 13 bytes a tile, 4 a row and 4 a sequence. fa3 keeps 28 for each tile and head.
    """
    group = spec.num_heads // spec.num_kv_heads
    fa2_tiles = -(-max_num_rows * group // MIN_QUERY_TILE) + spec.max_num_seqs
    fa2_bytes = 13 * fa2_tiles + 4 * (max_num_rows + spec.max_num_seqs)
    fa3_tiles = -(-max_num_rows // MAX_QUERY_TILE) + spec.max_num_seqs
    return max(fa2_bytes, 28 * spec.num_heads * fa3_tiles) + INT_SLACK_BYTES


def _row_bytes(spec: AttentionSpec) -> int:
    """Returns the bytes of PagedRows' fields for the most decodes, each of the longest length."""
    num_seqs = spec.max_num_seqs
    sizes = (num_seqs + 1, num_seqs, num_seqs + 1, num_seqs, num_seqs * spec.max_pages)
    return sum(-(-4 * size // ALIGN) * ALIGN for size in sizes)
