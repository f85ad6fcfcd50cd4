"""The page pool on a device: one allocation that KV cache and adapters share."""

from dataclasses import dataclass
from pathlib import Path

import torch

from loraplex.memory.adapter_layout import ROW_ALIGN
from loraplex.memory.config import MemoryConfig
from loraplex.memory.free_memory import available_bytes

CPU_POOL_BYTES = 1 << 30
"""Largest pool on a CPU by default."""


class PoolSizeError(ValueError):
    """The pool cannot be made as configured; the text says what to change."""


@dataclass(frozen=True, slots=True)
class PageShape:
    """Sizes of a page, which holds `block_tokens` rows of K, then of V, in each layer.

    Raises:
        PoolSizeError: a page does not hold whole rows of an adapter.
    """

    num_layers: int
    block_tokens: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype  # of adapters
    kv_dtype: torch.dtype | None = None  # of K and V; None: `dtype`

    def __post_init__(self) -> None:
        row_bytes = ROW_ALIGN * self.dtype.itemsize
        if self.page_bytes % row_bytes:
            raise PoolSizeError(
                f"a page of {self.block_tokens} tokens x 2 x {self.num_kv_heads} KV heads x "
                f"{self.head_dim} has {self.page_bytes} bytes, which is no multiple of "
                f"{row_bytes}: raise block_tokens"
            )

    @property
    def page_dtype(self) -> torch.dtype:
        """The type of K and V."""
        return self.kv_dtype or self.dtype

    @property
    def page_elems(self) -> int:
        """Elements of an adapter that one page holds in one layer."""
        return self.page_bytes // self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in one layer."""
        num_elems = self.block_tokens * 2 * self.num_kv_heads * self.head_dim
        return num_elems * self.page_dtype.itemsize

    @property
    def bytes_over_layers(self) -> int:
        """Bytes of one page over all layers."""
        return self.page_bytes * self.num_layers


class PagePool:
    """The memory of all pages.

    It starts as zeros, so the null page is finite.

    Attributes:
        pages: [num_layers, num_pages, page_elems] of the adapters' dtype.
        kv: the same memory, [num_layers, num_pages, 2, block_tokens, num_kv_heads, head_dim] of
            the dtype of K and V.
    """

    def __init__(self, shape: PageShape, num_pages: int, device: torch.device) -> None:
        self.shape = shape
        self.num_pages = num_pages
        self.pages = torch.zeros(
            shape.num_layers, num_pages, shape.page_elems, dtype=shape.dtype, device=device
        )
        self.kv = self.pages.view(shape.page_dtype).view(
            shape.num_layers, num_pages, 2, shape.block_tokens, shape.num_kv_heads, shape.head_dim
        )

    def write_pages(self, page_ids: torch.Tensor, packed: torch.Tensor) -> None:
        """Copy an adapter into its pages; on a GPU, enqueue that on the current stream.

        Args:
            page_ids: int64 [n], on the pool's device.
            packed: [num_layers, n * page_elems] of the pool's dtype, on the CPU, page-locked for
                a GPU.
        """
        per_layer = packed.view(self.shape.num_layers, -1, self.shape.page_elems)
        # One layer at a time limits the temporary memory on the device.
        for layer, source in zip(self.pages, per_layer, strict=True):
            layer.index_copy_(0, page_ids, source.to(layer.device, non_blocking=True))


def choose_num_pages(config: MemoryConfig, shape: PageShape, free_bytes: int) -> int:
    """Return the pages of the pool: as configured, or as many as fit in `free_bytes`.

    Raises:
        PoolSizeError: there is no page beside the null page.
    """
    if config.num_pages is not None:
        num_pages, source = config.num_pages, f"num_pages {config.num_pages}"
    elif config.pool_bytes is not None:
        num_pages = config.pool_bytes // shape.bytes_over_layers
        source = f"pool_bytes {config.pool_bytes}"
    else:
        num_pages = max(0, free_bytes) // shape.bytes_over_layers
        source = f"{max(0, free_bytes)} bytes of memory left for the page pool"
    if num_pages < 2:
        raise PoolSizeError(
            f"{source} hold fewer than 2 pages of {shape.bytes_over_layers} bytes: raise "
            "gpu_memory_utilization, pool_bytes or num_pages, or lower max_num_batched_tokens"
        )
    return num_pages


def free_cpu_bytes(root: Path = Path("/")) -> int:
    """Return the default pool size on a CPU: a quarter of the available memory, at most 1 GiB.

    Args:
        root: folder that holds proc and sys, see available_bytes.
    """
    return min(CPU_POOL_BYTES, available_bytes(root) // 4)


def free_gpu_bytes(
    device: torch.device, utilization: float, *, activation_bytes: int, margin_bytes: int
) -> int:
    """Return the bytes that the pool may take once weights are loaded.

    Args:
        utilization: share of the GPU's memory that the whole engine may use.
        activation_bytes: bytes that a step needs; they are kept free.
        margin_bytes: bytes kept free for fragmentation and library workspaces.
    """
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    # Memory that other processes use counts as used.
    allowed = int(total * utilization) - (total - free)
    return allowed - activation_bytes - margin_bytes
