"""The compiled modules of flashinfer 0.6: their plan and their run.

The library's wrapper classes are not used. Their plan copies from pageable memory and finds the
longest sequence by a Python loop over a tensor. Each wrapper keeps 16 MB, and CUDA graphs need one
for each batch size. Here plans of all sizes share their scratch memory. That is safe because one
stream orders the kernels that use it.

The modules and the arguments of their plan and run are private to the library (0.6.13 was read):
pyproject.toml bounds its version.
"""

import logging
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from loraplex.backends.attention.contract import AttentionSpec
from loraplex.backends.attention.flashinfer.jit import build_errors, jit_spec, module_key
from loraplex.backends.attention.paged_rows import PagedRows
from loraplex.backends.launch.buffers import PooledBuffer
from loraplex.backends.launch.upload import PinnedRing

logger = logging.getLogger("loraplex")

NO_WINDOW, NO_SOFT_CAP, NO_FIXED_SPLIT = -1, 0.0, -1
CUDA_CORE_GROUPS = (1, 2, 3)
"""Query heads a KV head for which decode runs on CUDA cores. From 4 on, tensor cores were measured
to be faster."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """Device memory of one plan of a module, besides the rows themselves."""

    floats: torch.Tensor  # uint8, scratch of one run for split sequences; shared by all plans
    ints: torch.Tensor  # uint8, the plan, which the kernels read
    buffer: PooledBuffer | None  # owns `ints`; None: they are static


class Module(Protocol):
    """One family of kernels, for one AttentionSpec."""

    def plan(self, workspace: Workspace, rows: PagedRows, *, for_graph: bool) -> Any:
        """Queue a copy of the plan into `workspace.ints`. Returns what `run` takes as `plan_info`.

        With `for_graph` the result is equal for all plans of as many rows: grid sizes and offsets
        are upper bounds.
        """
        ...

    def run(
        self,
        workspace: Workspace,
        plan_info: Any,
        rows: dict[str, torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Attend for one layer; writes `out`.

        Args:
            rows: the fields of PagedRows, on the device.
            q: [T, num_heads, head_dim]; out alike.
            k, v: [num_pages, block_tokens, num_kv_heads, head_dim], any stride of pages.
        """
        ...


class PrefillModule:
    """Kernels with tiles of queries: "fa2" or "fa3" (Hopper).

    With one query a sequence fa2 decodes on tensor cores: the query heads that share a KV head
    are a tile's rows. `causal` must then be False: the only query sees all keys.
    """

    def __init__(self, spec: AttentionSpec, kind: str, *, causal: bool) -> None:
        from flashinfer.prefill import get_batch_prefill_module
        from flashinfer.utils import MaskMode, TensorLayout, device_support_pdl

        self._module: Any = get_batch_prefill_module(kind, *module_key(spec), False)
        self._spec = spec
        self._kind = kind
        self._causal = causal
        self._mask_mode = (MaskMode.CAUSAL if causal else MaskMode.NON_CAUSAL).value
        self._layout = TensorLayout["NHD"].value
        self._enable_pdl = device_support_pdl(spec.device)
        self._pinned = PinnedRing(spec.device)

    def plan(self, workspace: Workspace, rows: PagedRows, *, for_graph: bool) -> Any:
        spec = self._spec
        starts = [torch.from_numpy(x) for x in (rows.query_starts, rows.page_starts, rows.kv_lens)]
        # The total and the number of sequences, as the library's own wrappers pass them.
        sizes = (int(rows.query_starts[-1]), len(rows.kv_lens))
        heads = (spec.num_heads, spec.num_kv_heads, spec.block_tokens)
        arguments = [for_graph, spec.head_dim, spec.head_dim, self._causal, NO_WINDOW]
        if self._kind == "fa2":
            arguments += [NO_FIXED_SPLIT, False, 0]  # split long sequences; no colocated kernels
        pinned = _take(self._pinned, workspace)
        info = self._module.plan(
            workspace.floats, workspace.ints, pinned, *starts, *sizes, *heads, *arguments
        )
        self._pinned.mark_copied()
        return info

    def run(
        self,
        workspace: Workspace,
        plan_info: Any,
        rows: dict[str, torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        self._module.paged_run(
            float_workspace_buffer=workspace.floats,
            int_workspace_buffer=workspace.ints,
            plan_info_vec=plan_info,
            q=q,
            paged_k_cache=k,
            paged_v_cache=v,
            qo_indptr=rows["query_starts"],
            paged_kv_indptr=rows["page_starts"],
            paged_kv_indices=rows["page_ids"],
            paged_kv_last_page_len=rows["last_page_lens"],
            o=out,
            maybe_lse=None,
            mask_mode=self._mask_mode,
            layout=self._layout,
            window_left=NO_WINDOW,
            enable_pdl=self._enable_pdl,
            maybe_custom_mask=None,
            maybe_mask_indptr=None,
            maybe_alibi_slopes=None,
            maybe_prefix_len_ptr=None,
            maybe_token_pos_in_items_ptr=None,
            maybe_max_item_len_ptr=None,
            logits_soft_cap=NO_SOFT_CAP,
            sm_scale=self._spec.scale,
            scale_q=None,
            scale_k=None,
            scale_v=None,
            rope_scale=1.0,
            rope_theta=1e4,
            token_pos_in_items_len=0,
            workspace_size=workspace.floats.numel(),
        )


class DecodeModule:
    """Kernels on CUDA cores, one query a sequence."""

    def __init__(self, spec: AttentionSpec) -> None:
        from flashinfer.decode import get_batch_decode_module
        from flashinfer.utils import TensorLayout, device_support_pdl

        self._module: Any = get_batch_decode_module(*module_key(spec))
        self._spec = spec
        self._layout = TensorLayout["NHD"].value
        self._enable_pdl = device_support_pdl(spec.device)
        # They give the types of q and of the pages.
        self._empty_q = torch.empty(0, dtype=spec.dtype)
        self._empty_kv = torch.empty(0, dtype=spec.page_dtype)
        self._pinned = PinnedRing(spec.device)

    def plan(self, workspace: Workspace, rows: PagedRows, *, for_graph: bool) -> Any:
        spec = self._spec
        pinned = _take(self._pinned, workspace)
        info = self._module.plan(
            workspace.floats,
            workspace.ints,
            pinned,
            torch.from_numpy(rows.page_starts),
            len(rows.kv_lens),
            spec.num_heads,
            spec.num_kv_heads,
            spec.block_tokens,
            for_graph,
            NO_WINDOW,
            NO_SOFT_CAP,
            spec.head_dim,
            spec.head_dim,
            self._empty_q,
            self._empty_kv,
        )
        self._pinned.mark_copied()
        return info

    def run(
        self,
        workspace: Workspace,
        plan_info: Any,
        rows: dict[str, torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        self._module.run(
            float_workspace_buffer=workspace.floats,
            int_workspace_buffer=workspace.ints,
            plan_info_vec=plan_info,
            q=q,
            paged_k_cache=k,
            paged_v_cache=v,
            paged_kv_indptr=rows["page_starts"],
            paged_kv_indices=rows["page_ids"],
            paged_kv_last_page_len=rows["last_page_lens"],
            o=out,
            maybe_lse=None,
            kv_layout_code=self._layout,
            window_left=NO_WINDOW,
            enable_pdl=self._enable_pdl,
            alibi_slopes=None,
            logits_soft_cap=NO_SOFT_CAP,
            sm_scale=self._spec.scale,
            rope_scale=1.0,
            rope_theta=1e4,
        )


def _take(ring: PinnedRing, workspace: Workspace) -> torch.Tensor:
    """Returns page-locked memory as long as `workspace.ints`. The library lays out a plan in it and
    queues the copy."""
    num_bytes = workspace.ints.numel()
    return ring.take(num_bytes)[:num_bytes]


def decode_kind(spec: AttentionSpec) -> str:
    """Returns the kind of kernels that decode: "cuda-cores" or "fa2"."""
    group = spec.num_heads // spec.num_kv_heads
    return "cuda-cores" if group in CUDA_CORE_GROUPS else "fa2"


def make_module(spec: AttentionSpec, kind: str, *, causal: bool) -> Module:
    """Load the kernels. Builds them first if they are not prebuilt."""
    found = jit_spec(spec, kind)
    if not found.is_compiled:
        logger.info("building attention kernels %s, once; up to a few minutes", found.name)
    try:
        if kind == "cuda-cores":
            return DecodeModule(spec)
        return PrefillModule(spec, kind, causal=causal)
    except (OSError, RuntimeError) as error:
        build_errors[found.name] = str(error)[-500:].strip()
        raise
