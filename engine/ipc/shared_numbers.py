"""Numbers in a small file that several processes map."""

import mmap
import os


def map_numbers(path: str, count: int) -> "memoryview[float]":
    """Returns `count` float64 that lie in the file at `path`; it is made if there is none.

    One process writes, any may read at the same time. A number is never read half written, since
    each lies within one aligned word.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, 8 * count)
        memory = mmap.mmap(fd, 8 * count)
    finally:
        os.close(fd)
    return memoryview(memory).cast("d")
