"""The age of the last step, which the scheduler writes and the frontends read.

Health must be true while the scheduler hangs, so no message carries the age. It lies in a small
file in the run directory that these processes map.
"""

import mmap
import os
import struct
import time

_LAYOUT = struct.Struct("<dq")  # end of the last step in seconds (0: none yet), steps in flight
_COUNT_OFFSET = 8


class StepClock:
    """Holds when the last step ended, and how many are in flight. One process writes."""

    def __init__(self, path: str = "") -> None:
        """Maps the file, which it makes if there is none; "" is for one process alone."""
        if not path:
            self._memory = mmap.mmap(-1, _LAYOUT.size)
            return
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, _LAYOUT.size)
            self._memory = mmap.mmap(fd, _LAYOUT.size)
        finally:
            os.close(fd)

    def set_in_flight(self, num_steps: int) -> None:
        struct.pack_into("<q", self._memory, _COUNT_OFFSET, num_steps)

    def step_ended(self) -> None:
        struct.pack_into("<d", self._memory, 0, time.monotonic())

    @property
    def num_in_flight(self) -> int:
        """Steps that the workers have not answered."""
        return int(_LAYOUT.unpack_from(self._memory)[1])

    @property
    def age_s(self) -> float | None:
        """Seconds since the end of the last step; None before the first one."""
        ended_at = float(_LAYOUT.unpack_from(self._memory)[0])
        return max(0.0, time.monotonic() - ended_at) if ended_at else None
