"""Page-locking without a GPU."""

import threading
from pathlib import Path

import pytest
import torch

DEVICE = 3


class FakeCudart:
    """Records page-locked memory; the `refused`th piece is not locked. `install`
    puts one in CUDA's place."""

    def __init__(self, refused: int = -1) -> None:
        self.refused = refused
        self.locked: dict[int, int] = {}
        self.num_unlocked = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def set_device(device: int) -> None:
            assert device == DEVICE

        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: DEVICE)
        monkeypatch.setattr(torch.cuda, "set_device", set_device)

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:  # noqa: N802
        assert address % 4096 == 0 and num_bytes > 0 and flags == 0
        if len(self.locked) == self.refused:
            return 2
        self.locked[address] = num_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        assert (Path("/proc/self/maps").read_text()).count("memfd:loraplex-adapters")
        del self.locked[address]
        self.num_unlocked += 1
        return 0


def await_unlocking() -> None:
    for thread in threading.enumerate():
        if thread.name == "slab-unlocker":
            thread.join()
