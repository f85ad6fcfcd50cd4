"""Slabs that another process can map: whose they are, where things lie in them, when they go."""

import gc
import os
import subprocess
import sys

import pytest
import torch

from loraplex.memory.device.page_copier import TRANSFER_BYTES, transfers
from loraplex.memory.host import slab
from loraplex.memory.host.slab import (
    PIECE_BYTES,
    live_slabs,
    mapped_slab,
    pieces,
    place_of,
    plain_slab,
    shared_slab,
)

from helpers.fakes.fake_cudart import FakeCudart, await_unlocking


@pytest.fixture(autouse=True)
def no_other_slabs() -> None:
    """Slabs of tests before this one may be on their way out."""
    gc.collect()
    await_unlocking()


def num_mappings() -> int:
    with open("/proc/self/maps") as maps:
        return sum("memfd:loraplex-adapters" in line for line in maps)


def test_two_mappings_are_one_memory_and_its_place_is_known() -> None:
    slab = shared_slab(3 * 4096 + 512, page_locked=False)
    assert slab.shape == (3 * 4096 + 512,) and slab.dtype == torch.uint8
    part = slab[4096 + 512 : 8192]
    place = place_of(part)
    assert (place.slab_bytes, place.offset) == (slab.nbytes, 4096 + 512)
    assert place.slab_id in live_slabs()
    assert place_of(slab[3:9][1:]).offset == 4
    other = mapped_slab(place.fd, place.slab_bytes)
    part.fill_(7)
    assert (other[place.offset : 8192] == 7).all() and not other[: place.offset].any()
    other[0] = 9
    assert slab[0] == 9


def test_memory_goes_with_the_last_tensor_also_where_others_map_it() -> None:
    before, mapped = live_slabs(), num_mappings()
    slab = shared_slab(1 << 20, page_locked=False)
    (slab_id,) = set(live_slabs()) - set(before)
    fd = place_of(slab).fd
    kept = os.dup(fd)
    part = slab[100:200].view(torch.int32)
    del slab
    assert slab_id in live_slabs() and num_mappings() == mapped + 1
    part.fill_(1)
    del part
    assert live_slabs() == before and num_mappings() == mapped
    assert os.fstat(kept).st_size == 0, "whoever has it mapped holds no memory"
    os.close(kept)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_ids_are_never_used_again() -> None:
    seen: set[int] = set()
    for _ in range(5):
        slab_id = place_of(shared_slab(4096, page_locked=False)).slab_id
        assert slab_id not in seen
        seen.add(slab_id)


def test_a_host_without_the_memory_says_so() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(
        MemoryError, match="4611686018427387904 bytes of host memory are needed, and"
    ):
        shared_slab(1 << 62, page_locked=False)
    assert len(os.listdir("/proc/self/fd")) <= before  # others may end meanwhile


def test_no_slab_beyond_the_limit_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab, "available_bytes", lambda: 1300)
    with pytest.raises(MemoryError):
        shared_slab(4096, page_locked=False)


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> FakeCudart:
    fake = FakeCudart()
    fake.install(monkeypatch)
    return fake


def test_pages_are_locked_by_pieces_and_unlocked_before_they_go(cudart: FakeCudart) -> None:
    before = num_mappings()
    slab = shared_slab(2 * PIECE_BYTES + 4096, page_locked=True)
    assert cudart.locked == dict(pieces(slab.data_ptr(), slab.nbytes))
    assert len(cudart.locked) >= 3
    del slab
    await_unlocking()
    assert not cudart.locked and cudart.num_unlocked >= 3 and num_mappings() == before


def test_a_driver_that_refuses_keeps_nothing(cudart: FakeCudart) -> None:
    before, cudart.refused = num_mappings(), 2
    with pytest.raises(RuntimeError, match="cannot be page-locked: 2"):
        shared_slab(4 * PIECE_BYTES, page_locked=True)
    await_unlocking()
    assert not cudart.locked and cudart.num_unlocked == 2 and num_mappings() == before


def test_a_process_that_ends_waits_until_no_thread_is_in_the_driver() -> None:
    code = """
import os, time
import torch
from loraplex.memory.host.slab import PIECE_BYTES, shared_slab

class SlowCudart:
    def cudaHostRegister(self, address, num_bytes, flags):
        return 0

    def cudaHostUnregister(self, address):
        os.write(1, b"enters ")
        time.sleep(0.5)
        os.write(1, b"leaves ")

torch.cuda.cudart = SlowCudart
torch.cuda.current_device = lambda: 0
torch.cuda.set_device = lambda device: None
slab = shared_slab(5 * PIECE_BYTES, page_locked=True)
del slab
time.sleep(0.1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    words = done.stdout.split()
    assert words == ["enters", "leaves"] * (len(words) // 2)
    assert 1 <= len(words) // 2 < 5


def test_other_memory_has_no_place() -> None:
    for tensor in (plain_slab(10), torch.zeros(3)):
        with pytest.raises(ValueError, match="no shared slab"):
            place_of(tensor)


@pytest.mark.parametrize("address", [0, 4096, PIECE_BYTES - 4096, 3 * PIECE_BYTES + 8192])
@pytest.mark.parametrize("num_bytes", [8, 4096, PIECE_BYTES, 5 * PIECE_BYTES - 4096])
def test_no_transfer_crosses_from_one_piece_to_the_next(address: int, num_bytes: int) -> None:
    parts = list(pieces(address, num_bytes))
    assert parts[0][0] == address and sum(size for _, size in parts) == num_bytes
    assert all(a + n == b for (a, n), (b, _) in zip(parts, parts[1:], strict=False))
    for start in (address, address + num_bytes // 16 * 8):  # from there to the end
        sizes = transfers(start, address + num_bytes - start)
        assert sum(sizes) == address + num_bytes - start
        assert all(0 < size <= TRANSFER_BYTES for size in sizes)
        for size in sizes:
            assert any(a <= start and start + size <= a + n for a, n in parts)
            start += size
