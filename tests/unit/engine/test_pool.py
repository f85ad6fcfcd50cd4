"""The page pool and the host store."""

import threading

import pytest
import torch

from loraplex.memory.config import MemoryConfig
from loraplex.memory.host_store import HostStore, PackedAdapter
from loraplex.memory.pool import (
    CPU_POOL_BYTES,
    PagePool,
    PageShape,
    PoolSizeError,
    available_ram_bytes,
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
    with pytest.raises(
        PoolSizeError, match="1 tokens x 2 x 1 KV heads x 16 has 32 elements.*raise"
    ):
        PageShape(num_layers=1, block_tokens=1, num_kv_heads=1, head_dim=16, dtype=torch.float32)


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
    assert 0 < free_cpu_bytes() <= min(CPU_POOL_BYTES, available_ram_bytes() // 4 + (1 << 28))


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


def make_packed(name: str, num_bytes: int = 100) -> PackedAdapter:
    empty = torch.zeros(1, 7, dtype=torch.int32)
    data = torch.zeros(num_bytes, dtype=torch.uint8)
    return PackedAdapter(name, 1, data, empty, empty, empty, empty.float())


def check(store: HostStore, *names: str) -> None:
    store.check_integrity()
    assert {name for name in "abcdefg" if name in store} == set(names)


def test_least_recently_used_goes_first() -> None:
    store = HostStore(300)
    for name in "abc":
        store.add(make_packed(name))
    check(store, "a", "b", "c")
    assert store.pin("a") is not None
    store.unpin("a")
    store.add(make_packed("d"))
    check(store, "a", "c", "d")
    first = store.add(make_packed("a"))
    assert store.add(make_packed("a")) is first
    store.add(make_packed("e"))
    check(store, "a", "d", "e")
    assert store.num_bytes == 300 and len(store) == 3


def test_pinned_stay_and_oversized_is_kept_until_the_next() -> None:
    store = HostStore(200)
    store.add(make_packed("a"), pin=True)
    assert store.pin("a") is not None
    store.add(make_packed("b", 500))
    check(store, "a", "b")
    store.add(make_packed("c"))
    check(store, "a", "c")
    store.add(make_packed("d"), pin=True)
    check(store, "a", "d")
    store.unpin("a")
    store.add(make_packed("e"))
    check(store, "a", "d", "e")
    store.unpin("a")
    check(store, "a", "d")
    assert store.pin("zz") is None
    with pytest.raises(KeyError):
        store.unpin("never")


def test_store_under_threads() -> None:
    store = HostStore(250)

    def work(seed: int) -> None:
        for i in range(200):
            name = "abcdefg"[(seed * 31 + i * 7) % 7]
            store.add(make_packed(name), pin=True)
            assert name in store
            store.unpin(name)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.check_integrity()
    assert store.num_bytes <= 250
