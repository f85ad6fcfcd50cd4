"""The compiled modules of flashinfer 0.6: their plan and their run.

The library's wrapper classes stay unused: their plan copies from pageable memory and looks for the
longest sequence by a Python loop over a tensor, each of them keeps 16 MB, and one that is replayed
in CUDA graphs is needed for each batch size. Here plans of all sizes share one workspace, which is
right because one stream orders the copies into it and the kernels that read it.
"""

import logging
from typing import Any, Protocol

import torch

from loraplex.backends.attention.contract import AttentionSpec
from loraplex.backends.attention.flashinfer.jit import build_errors, jit_spec, module_key
from loraplex.backends.attention.paged_rows import PagedRows
from loraplex.backends.launch.upload import PinnedRing

logger = logging.getLogger("loraplex")

NO_WINDOW, NO_SOFT_CAP, NO_FIXED_SPLIT = -1, 0.0, -1
CUDA_CORE_GROUPS = (1, 2, 3)
"""Query heads a KV head for which decode has kernels on CUDA cores and uses them: from 4 on, tensor
cores were measured to be faster."""


class PlanMemory:
    """What a module's plans write and its kernels read, besides the rows themselves.

    The library fills a page-locked buffer on the CPU and queues a copy to the device from it.

    Attributes:
        floats: scratch of split sequences; may be shared by all modules of one stream.
        ints: the plan on the device, overwritten in stream order.
        pinned: the buffers on the CPU.
    """

    def __init__(self, floats: torch.Tensor, num_int_bytes: int) -> None:
        self.floats = floats
        self.ints = torch.zeros(num_int_bytes, dtype=torch.uint8, device=floats.device)
        self.pinned = PinnedRing(floats.device)

    def take(self) -> torch.Tensor:
        """The buffer for the next plan, as long as `ints`; then `pinned.mark_copied()`."""
        return self.pinned.take(self.ints.numel())[: self.ints.numel()]


class Module(Protocol):
    """One family of kernels, for one AttentionSpec."""

    def plan(self, memory: PlanMemory, rows: PagedRows, *, for_graph: bool) -> Any:
        """Queue the plan's copy into `memory`; returns what `run` takes as `plan_info`.

        With `for_graph` it holds the same for every plan of as many rows: grid sizes and offsets
        are upper bounds.
        """
        ...

    def run(
        self,
        memory: PlanMemory,
        plan_info: Any,
        rows: dict[str, torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """`rows`: the fields of PagedRows on the device; k and v: [num_pages, block_tokens,
        num_kv_heads, head_dim], any stride of pages."""
        ...


class PrefillModule:
    """Kernels with tiles of queries: "fa2" or "fa3" (Hopper).

    With one query a sequence fa2 decodes on tensor cores: the query heads that share a KV head
    are a tile's rows. It then must not be told of causality: the only query sees all keys.
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

    def plan(self, memory: PlanMemory, rows: PagedRows, *, for_graph: bool) -> Any:
        spec = self._spec
        starts = [torch.from_numpy(x) for x in (rows.query_starts, rows.page_starts, rows.kv_lens)]
        # The total and the number of sequences, as the library's own wrappers pass them.
        sizes = (int(rows.query_starts[-1]), len(rows.kv_lens))
        heads = (spec.num_heads, spec.num_kv_heads, spec.block_tokens)
        arguments = [for_graph, spec.head_dim, spec.head_dim, self._causal, NO_WINDOW]
        if self._kind == "fa2":
            arguments += [NO_FIXED_SPLIT, False, 0]  # split long sequences; no colocated kernels
        pinned = memory.take()
        info = self._module.plan(
            memory.floats, memory.ints, pinned, *starts, *sizes, *heads, *arguments
        )
        memory.pinned.mark_copied()
        return info

    def run(
        self,
        memory: PlanMemory,
        plan_info: Any,
        rows: dict[str, torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        self._module.paged_run(
            float_workspace_buffer=memory.floats,
            int_workspace_buffer=memory.ints,
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
            workspace_size=memory.floats.numel(),
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
        self._empty = torch.empty(0, dtype=spec.dtype)  # says the type of q and of the cache

    def plan(self, memory: PlanMemory, rows: PagedRows, *, for_graph: bool) -> Any:
        spec = self._spec
        pinned = memory.take()
        info = self._module.plan(
            memory.floats,
            memory.ints,
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
            self._empty,
            self._empty,
        )
        memory.pinned.mark_copied()
        return info

    def run(
        self,
        memory: PlanMemory,
        plan_info: Any,
        rows: dict[str, torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        self._module.run(
            float_workspace_buffer=memory.floats,
            int_workspace_buffer=memory.ints,
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


def decode_kind(spec: AttentionSpec) -> str:
    """Which kernels decode: "cuda-cores" or "fa2"."""
    group = spec.num_heads // spec.num_kv_heads
    return "cuda-cores" if group in CUDA_CORE_GROUPS else "fa2"


def make_module(spec: AttentionSpec, kind: str, *, causal: bool) -> Module:
    """Load the kernels, and first build them if they are not prebuilt."""
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
