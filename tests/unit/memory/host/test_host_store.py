"""Packed adapters in host memory: least recently used out first, within a budget of slabs."""

import random
import threading
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch

from loraplex.memory.host.slab import plain_slab
from loraplex.memory.host.store import (
    GROW_AGAIN_S,
    Allocate,
    HostStore,
    MemoryInUseError,
    PackedAdapter,
)

UNIT = 1024
GUARD_S = 60.0  # only a thread that must wait gets there
EMPTY = torch.zeros(1, 7, dtype=torch.int32)


def reading(name: str, units: int = 1) -> Callable[[Allocate], PackedAdapter]:
    """A read that fills its memory with the name's first letter."""

    def read(allocate: Allocate) -> PackedAdapter:
        data = allocate(units * UNIT)
        assert data.shape == (units * UNIT,) and data.dtype == torch.uint8
        data.fill_(ord(name[0]))
        return PackedAdapter(name, 1, data.view(1, -1), *[EMPTY] * 5, EMPTY.float())

    return read


def check(store: HostStore, *names: str) -> None:
    store.check_integrity()
    assert {name for name in "abcdefg" if name in store} == set(names)
    for name in names:
        adapter = store.acquire(name)
        assert adapter is not None and (adapter.data == ord(name)).all()
        store.release(name)


def test_least_recently_used_goes_first() -> None:
    store = HostStore(3 * UNIT)
    for name in "abc":
        store.add(reading(name))
    assert store.acquire("a") is not None
    store.release("a")
    store.add(reading("d"))
    check(store, "a", "c", "d")
    first = store.add(reading("a"))
    assert store.add(reading("a")) is first
    assert store.num_bytes <= 3 * UNIT
    check(store, "a", "d")  # reading "a" again took the place of "c" for a while
    store.add(reading("e"))
    check(store, "a", "d", "e")
    assert store.num_bytes == store.num_slab_bytes == 3 * UNIT and len(store) == 3


def test_pinned_stay_and_oversized_is_kept_until_the_next() -> None:
    store = HostStore(2 * UNIT)
    store.add(reading("a"), acquire=True)
    assert store.acquire("a") is not None
    store.add(reading("b", 5))
    check(store, "a", "b")
    assert store.num_slab_bytes == 7 * UNIT
    store.add(reading("c"))
    check(store, "a", "c")
    assert store.num_slab_bytes == 2 * UNIT
    store.add(reading("d"), acquire=True)
    check(store, "a", "d")
    store.add(reading("e"), acquire=True)  # beyond the budget while all are in use
    check(store, "a", "d", "e")
    assert store.num_slab_bytes == 3 * UNIT
    store.release("e")
    check(store, "a", "d", "e")
    store.release("a")
    store.release("a")
    store.add(reading("f"))
    check(store, "d", "f")
    assert store.num_slab_bytes == 2 * UNIT
    assert store.acquire("zz") is None
    store.release("d")
    for name in ("never", "d"):
        with pytest.raises(ValueError, match="without a use"):
            store.release(name)


def test_slabs_of_other_sizes_make_way() -> None:
    """An adapter larger than a slab, and small ones after it."""
    store = HostStore(8 * UNIT, slab_bytes=2 * UNIT)
    for name in "abcd":
        store.add(reading(name, 2))
    store.add(reading("e", 5))
    store.check_integrity()
    assert "e" in store and store.num_slab_bytes <= 8 * UNIT
    for name in "fg":
        store.add(reading(name, 2))
        store.check_integrity()
        assert name in store and store.num_slab_bytes <= 8 * UNIT


def test_a_read_that_fails_leaves_nothing() -> None:
    store = HostStore(4 * UNIT)

    def fail(allocate: Allocate) -> PackedAdapter:
        allocate(UNIT)
        raise OSError("the disk is gone")

    for _ in range(10):
        with pytest.raises(OSError, match="disk is gone"):
            store.add(fail)
        store.check_integrity()
    assert store._space.num_free_bytes == store.num_slab_bytes == 4 * UNIT


def test_prepare_takes_a_slab_ahead_within_the_budget() -> None:
    store = HostStore(5 * UNIT, slab_bytes=2 * UNIT)
    store.prepare()
    store.prepare()
    assert store.num_slab_bytes == 2 * UNIT
    store.add(reading("a", 2))
    store.prepare()
    assert store.num_slab_bytes == 4 * UNIT
    store.add(reading("b", 2))
    store.prepare()
    check(store, "a", "b")
    assert store.num_slab_bytes == 4 * UNIT


def test_prepare_keeps_room_for_two() -> None:
    """For two adapters as large as the largest so far, however often it is called."""
    store = HostStore(100 * UNIT, slab_bytes=8 * UNIT)
    sizes = []
    for name in "abcdef":
        store.add(reading(name, 2))
        store.prepare()
        store.prepare()
        sizes.append(store.num_slab_bytes // UNIT)
    assert sizes == [8, 8, 16, 16, 16, 16]
    store.add(reading("g", 9))
    for _ in range(5):
        store.prepare()
    assert store.num_slab_bytes == (16 + 9 + 9 + 9) * UNIT
    store.check_integrity()


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), MemoryError("no space")])
def test_a_host_that_gives_no_more(error: Exception) -> None:
    """The store keeps to the memory that was given. A read fails only when all is in use."""
    slabs = [plain_slab(2 * UNIT)]

    def make_slab(num_bytes: int) -> torch.Tensor:
        if not slabs:
            raise error
        return slabs.pop()

    store = HostStore(9 * UNIT, slab_bytes=2 * UNIT, make_slab=make_slab)
    store.add(reading("a", 2), acquire=True)
    with pytest.raises(MemoryError, match="lower adapter_host_bytes"):
        store.add(reading("b"))
    store.release("a")
    store.add(reading("b"))
    check(store, "b")


def test_a_slab_that_could_not_be_had_is_asked_for_again() -> None:
    now, num_asked, is_full = 100.0, 0, True

    def make_slab(num_bytes: int) -> torch.Tensor:
        nonlocal num_asked
        num_asked += 1
        if is_full and num_asked > 1:
            raise OSError(24, "Too many open files")
        return plain_slab(num_bytes)

    store = HostStore(8 * UNIT, slab_bytes=2 * UNIT, make_slab=make_slab, clock=lambda: now)
    store.add(reading("a", 2))
    for _ in range(5):
        store.prepare()
    assert (num_asked, store.num_slab_bytes) == (2, 2 * UNIT), "it asks at each call"
    is_full = False
    now += GROW_AGAIN_S
    store.add(reading("b", 2))
    assert "a" in store and "b" in store
    for _ in range(5):
        store.prepare()
    assert store.num_slab_bytes == 8 * UNIT, "the budget is smaller than before"
    store.check_integrity()


def test_memory_that_may_still_be_written_is_not_given_to_others() -> None:
    store = HostStore(4 * UNIT, slab_bytes=4 * UNIT)

    def read(allocate: Allocate) -> PackedAdapter:
        allocate(2 * UNIT)
        raise MemoryInUseError("it hangs in the kernel")

    with pytest.raises(MemoryInUseError):
        store.add(read)
    store.add(reading("a"))
    store.add(reading("b"))
    store.add(reading("c"))
    check(store, "b", "c")


def test_under_threads() -> None:
    """Readers of random sizes; every pinned adapter keeps its bytes."""
    store = HostStore(12 * UNIT, slab_bytes=4 * UNIT)
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(150):
                name = rng.choice("abcdefg")
                adapter = store.add(reading(name, 1 + "abcdefg".index(name) % 5), acquire=True)
                store.prepare()
                assert name in store and (adapter.data == ord(name)).all()
                store.release(name)
                store.check_integrity()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    store.check_integrity()
    assert store._space.num_free_bytes == store.num_slab_bytes - store.num_bytes


def test_dropped_ones_free_their_memory_at_once_or_with_their_last_pin() -> None:
    store = HostStore(4 * UNIT, slab_bytes=2 * UNIT)
    for name in "ab":
        store.add(reading(name, 2))
    store.drop("a")
    store.drop("never")
    check(store, "b")
    assert store.num_bytes == 2 * UNIT and store.take_evicted() == ["a"]
    assert store.acquire("b") is not None and store.acquire("b") is not None
    store.drop("b")
    check(store, "b")  # which asks for it, so that it stays
    store.release("b")
    store.release("b")
    check(store, "b")
    assert store.acquire("b") is not None
    store.drop("b")
    store.drop("b")
    store.release("b")
    check(store)
    assert store.num_bytes == 0 and store.take_evicted() == ["b"]
    assert store.num_slab_bytes == 2 * UNIT, "one empty slab is kept"
    store.add(reading("c"), acquire=True)
    store.drop("c")
    store.add(reading("c"))  # read again meanwhile: it is wanted
    store.release("c")
    check(store, "c")


def test_what_made_room_is_told_in_order() -> None:
    store = HostStore(2 * UNIT)
    for name in "abcd":
        store.add(reading(name))
    assert store.take_evicted() == ["a", "b"] and store.take_evicted() == []
    store.add(reading("e", 2))
    assert store.take_evicted() == ["c", "d"]


def drop_unused(store: HostStore) -> None:
    for name in "ba":
        store.drop(name)


def drop_in_use(store: HostStore) -> None:
    assert store.acquire("a") is not None
    drop_unused(store)
    store.release("a")


def exceed_the_budget(store: HostStore) -> None:
    assert store.acquire("a") is not None
    assert store.acquire("b") is not None
    store.add(reading("c"))
    store.add(reading("d"))


def need_a_larger_slab(store: HostStore) -> None:
    store.add(reading("c", units=2))


def fail_to_read(store: HostStore) -> None:
    assert store.acquire("a") is not None
    assert store.acquire("b") is not None

    def fail(allocate: Allocate) -> PackedAdapter:
        allocate(UNIT)
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        store.add(fail)


@pytest.mark.parametrize(
    "act", [drop_unused, drop_in_use, exceed_the_budget, need_a_larger_slab, fail_to_read]
)
def test_no_thread_waits_while_a_slab_is_freed(act: Callable[[HostStore], None]) -> None:
    went_on: list[bool] = []

    def when_freed() -> None:
        """Let another thread use the store while the system takes the memory back."""
        thread = threading.Thread(target=lambda: store.num_bytes, daemon=True)
        thread.start()
        thread.join(GUARD_S)
        went_on.append(not thread.is_alive())

    def make_slab(num_bytes: int) -> torch.Tensor:
        memory = np.empty(num_bytes, dtype=np.uint8)
        weakref.finalize(memory, when_freed).atexit = False
        return torch.from_numpy(memory)

    store = HostStore(2 * UNIT, make_slab=make_slab, slab_bytes=UNIT)
    for name in "ab":
        store.add(reading(name))
    act(store)
    store.check_integrity()
    assert went_on
    assert all(went_on)
