"""Paths of adapters whose two files are memory files of another process.

They are relative, so no client can name one: the paths that clients send are made absolute.
"""

from pathlib import Path

from loraplex.engine.adapters.paths import ADAPTER_FILE, WEIGHTS_FILE

_PREFIX = "memory:"


def memory_folder(pid: int, config_fd: int, tensors_fd: int) -> str:
    """Returns the path of an adapter whose files process `pid` has open."""
    return f"{_PREFIX}{pid}:{config_fd}:{tensors_fd}"


def is_memory_folder(folder: Path) -> bool:
    return str(folder).startswith(_PREFIX)


def memory_path(path: Path) -> Path:
    """Returns where to open a file of such a folder.

    Raises:
        FileNotFoundError: the folder has no file of this name.
    """
    _, pid, config_fd, tensors_fd = str(path.parent).split(":")
    fds = {ADAPTER_FILE: config_fd, WEIGHTS_FILE: tensors_fd}
    if path.name not in fds:
        raise FileNotFoundError(path)
    return Path(f"/proc/{pid}/fd/{fds[path.name]}")
