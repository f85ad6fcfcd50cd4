"""The page pool, and copies of adapters into it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loraplex.memory.config import MemoryConfig
from loraplex.memory.device.page_copier import chunks, make_page_copier
from loraplex.memory.device.pool import (
    CPU_POOL_BYTES,
    PagePool,
    PageShape,
    PoolSizeError,
    choose_num_pages,
    free_cpu_bytes,
)

SHAPE = PageShape(num_layers=3, block_tokens=4, num_kv_heads=2, head_dim=16, dtype=torch.float16)


def test_kv_is_the_same_memory_as_pages() -> None:
    pool = PagePool(SHAPE, 5, torch.device("cpu"))
    assert pool.pages.shape == (3, 5, 256) and pool.kv.shape == (3, 5, 2, 4, 2, 16)
    assert not pool.pages.any()
    pool.kv[1, 3, 1, 2, 0, 5] = 7.0
    assert pool.pages[1, 3, 128 + 2 * 32 + 5] == 7.0
    assert SHAPE.page_bytes == 512 and SHAPE.bytes_over_layers == 1536


def test_page_must_be_whole_rows() -> None:
    with pytest.raises(PoolSizeError, match="1 tokens x 2 x 1 KV heads x 16 has 128 bytes.*raise"):
        PageShape(num_layers=1, block_tokens=1, num_kv_heads=1, head_dim=16, dtype=torch.float32)


def test_pages_in_e4m3_share_the_pool_by_bytes() -> None:
    half = replace(SHAPE, kv_dtype=torch.float8_e4m3fn)
    assert (half.page_bytes, half.page_elems) == (256, 128)
    assert choose_num_pages(MemoryConfig(), half, 1536 * 7) == 14  # twice the tokens
    pool = PagePool(half, 5, torch.device("cpu"))
    assert pool.pages.shape == (3, 5, 128) and pool.pages.dtype is torch.float16
    assert pool.kv.shape == (3, 5, 2, 4, 2, 16) and pool.kv.dtype is torch.float8_e4m3fn
    pool.kv[1, 3, 1, 2, 0, 5] = torch.tensor(7.0)
    values = pool.pages[1, 3].view(torch.float8_e4m3fn).float()
    assert values[128 + 2 * 32 + 5] == 7.0 and values.count_nonzero() == 1


def test_write_pages_touches_no_other_page() -> None:
    pool = PagePool(SHAPE, 6, torch.device("cpu"))
    pool.pages.fill_(-1)
    packed = torch.arange(3 * 2 * 256).view(3, 512).half()
    pool.write_pages(torch.tensor([4, 1]), packed)
    assert torch.equal(pool.pages[:, 4], packed[:, :256])
    assert torch.equal(pool.pages[:, 1], packed[:, 256:])
    assert (pool.pages[:, [0, 2, 3, 5]] == -1).all()


def test_number_of_pages() -> None:
    assert choose_num_pages(MemoryConfig(num_pages=9, pool_bytes=1), SHAPE, 0) == 9
    assert choose_num_pages(MemoryConfig(pool_bytes=1536 * 4 + 5), SHAPE, 0) == 4
    assert choose_num_pages(MemoryConfig(), SHAPE, 1536 * 7) == 7
    for config, free in (
        (MemoryConfig(num_pages=1), 0),
        (MemoryConfig(pool_bytes=1536), 0),
        (MemoryConfig(), 1536),
        (MemoryConfig(), -5),
    ):
        with pytest.raises(PoolSizeError, match="fewer than 2 pages of 1536 bytes: raise"):
            choose_num_pages(config, SHAPE, free)


def test_cpu_default_is_bounded() -> None:
    assert 0 < free_cpu_bytes() <= CPU_POOL_BYTES


def test_cpu_default_keeps_to_the_limit_of_a_container(tmp_path: Path) -> None:
    """Otherwise the kernel kills the worker while it loads."""
    for name, text in {
        "proc/meminfo": "MemAvailable: 64000000 kB\n",
        "sys/fs/cgroup/memory.max": "500000000\n",
        "sys/fs/cgroup/memory.current": "110000000\n",
        "sys/fs/cgroup/memory.stat": "anon 9\ninactive_file 10000000\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert free_cpu_bytes(tmp_path) == 100_000_000


@pytest.mark.gpu
def test_pool_beyond_32_bit_offsets() -> None:
    """A layer of more than 2^31 elements."""
    shape = PageShape(1, 128, 8, 128, torch.float16)
    pool = PagePool(shape, (1 << 31) // shape.page_elems + 3, torch.device("cuda"))
    last = pool.num_pages - 1
    packed = torch.randn(1, shape.page_elems).half().pin_memory()
    pool.write_pages(torch.tensor([last], device="cuda"), packed)
    assert torch.equal(pool.pages[0, last].cpu(), packed[0])
    rows = pool.kv[0].view(-1, 8, 128)
    index = torch.tensor([rows.shape[0] - 1], device="cuda")
    assert torch.equal(rows.index_select(0, index)[0].cpu().view(-1), packed[0, -1024:])


@pytest.mark.parametrize(
    ("num_layers", "num_pages", "max_pages"),
    [(32, 40, 128), (32, 40, 40), (3, 1, 1), (5, 7, 20), (2, 9, 4), (1, 1, 99), (4, 8, 7)],
)
def test_chunks_tile_an_adapter(num_layers: int, num_pages: int, max_pages: int) -> None:
    """In order, each contiguous and no larger than a staging buffer."""
    pages = torch.arange(num_layers * num_pages).view(num_layers, num_pages)
    seen: list[int] = []
    for layers, some in chunks(num_layers, num_pages, max_pages):
        chunk = pages[layers, some]
        assert chunk.is_contiguous() and 0 < chunk.numel() <= max_pages
        seen += chunk.flatten().tolist()
    assert seen == list(range(num_layers * num_pages))
    count = sum(1 for _ in chunks(num_layers, num_pages, max_pages))
    assert count <= 2 * -(-num_layers * num_pages // max_pages) + num_layers * (
        num_pages > max_pages
    )


def test_copy_on_a_cpu() -> None:
    pool = PagePool(SHAPE, 6, torch.device("cpu"))
    packed = torch.arange(3 * 2 * 256).view(3, 512).half()
    copier, told = make_page_copier(pool), []
    event = copier.copy(
        packed, [4, 1], wait_for=copier.record_event(), then=lambda ids: told.append(ids)
    )
    event.synchronize()
    assert torch.equal(pool.pages[:, [4, 1]], packed.view(3, 2, 256))
    assert not pool.pages[:, [0, 2, 3, 5]].any()
    assert told[0].tolist() == [4, 1]
