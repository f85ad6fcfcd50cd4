"""Reads how much host memory is free."""

import os
from pathlib import Path


def available_bytes(root: Path = Path("/")) -> int:
    """Returns the bytes of host memory that this process can have without swapping.

    It is the kernel's estimate, or less under a limit of the cgroup (a container, a batch job). The
    kernel does not refuse to give more; it kills a process later.

    Args:
        root: folder that holds proc and sys.
    """
    try:
        available = _read_sizes(root / "proc/meminfo")["MemAvailable:"] << 10
    except (OSError, ValueError, KeyError):
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cgroup = root / "sys/fs/cgroup"
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        cached = _read_sizes(cgroup / "memory.stat")["inactive_file"]
    except (OSError, ValueError, KeyError):  # no limit, or an unreadable one
        return available
    return max(0, min(available, limit - used + cached))


def _read_sizes(path: Path) -> dict[str, int]:
    """Reads a file of lines that begin with a name and a number."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {name: int(number) for name, number, *_ in lines}
