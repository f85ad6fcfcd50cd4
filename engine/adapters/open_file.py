"""Opens files of adapters: never a pipe, and never a file outside the folder for clients."""

import ctypes
import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from loraplex.engine.adapters.tensors.memory_folder import is_memory_folder, memory_path
from loraplex.engine.store_config import TENANT

_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
MAX_TEXT_BYTES = 64 << 20  # of a tokenizer
OPENAT2 = 437  # the number of the system call on every architecture
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_BENEATH = 0x08
_NUM_TRIES = 16  # the kernel gives up with EAGAIN when somebody renames a folder meanwhile
_NOT_SUPPORTED = (errno.ENOSYS, errno.EPERM)  # an old kernel; a container's filter


class NotRegularFileError(ValueError):
    """The path names a directory, a pipe or a device."""


class FileTooLargeError(ValueError):
    """The file has more bytes than a text of an adapter may have."""


class OutsideRootError(PermissionError):
    """The path leads out of the folder that clients or a tenant may name adapters in."""


class _OpenHow(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("flags", "mode", "resolve")]


@contextmanager
def open_regular_file(path: Path, root: str = "") -> Iterator[int]:
    """Yields the descriptor of a file. Does not wait for a writer if it is a pipe.

    Args:
        path: may also lie in a memory folder (tensors/memory_folder.py).
        root: real path of a folder. A `path` in it may go through symbolic links that stay in it,
            at the time of this call. Other paths are not restricted.

    Raises:
        OutsideRootError: a link leads out of `root`.
        NotRegularFileError: it is a directory, a pipe or a device.
        OSError: it cannot be opened.
    """
    if is_memory_folder(path.parent):
        path, root = memory_path(path), ""
    descriptor = _open_beneath(path, root) if is_beneath(path, root) else os.open(path, _FLAGS)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NotRegularFileError(f"{path.name} is no regular file")
        yield descriptor
    finally:
        os.close(descriptor)


def read_text_file(path: Path, root: str = "", max_bytes: int = MAX_TEXT_BYTES) -> bytes | None:
    """Returns a whole file, opened as open_regular_file does; None if there is no such file.

    Raises FileTooLargeError above `max_bytes`, a whole number of MiB.
    """
    try:
        with (
            open_regular_file(path, root) as descriptor,
            open(descriptor, "rb", closefd=False) as file,
        ):
            content = file.read(max_bytes + 1)
    except (FileNotFoundError, NotRegularFileError):
        return None
    if len(content) > max_bytes:
        raise FileTooLargeError(f"{path.name} has more than {max_bytes >> 20} MiB")
    return content


def file_reader(folder: Path, roots: Sequence[str]) -> Callable[[Path], bytes | None]:
    """Returns read_text_file() for the files of a folder."""
    return partial(read_text_file, root=root_of(folder, roots))


def root_of(folder: Path, roots: Sequence[str]) -> str:
    """Returns the deepest of the roots in which a folder lies as it is written, "" if none.

    A part {tenant} of a root stands for any name. The result has the folder's own.
    """
    parts = Path(os.path.normpath(folder)).parts
    deepest: tuple[str, ...] = ()
    for root in roots:
        wanted = Path(root).parts
        is_in = len(wanted) <= len(parts) and all(
            part in (TENANT, name) for part, name in zip(wanted, parts, strict=False)
        )
        if is_in and len(wanted) > len(deepest):
            deepest = parts[: len(wanted)]
    return str(Path(*deepest)) if deepest else ""


def is_beneath(path: Path, root: str) -> bool:
    """Tells whether `path`, as it is written, lies in `root`. No path lies in "" ."""
    return bool(root) and Path(os.path.normpath(path)).is_relative_to(root)


def _open_beneath(path: Path, root: str) -> int:
    inside = os.path.relpath(path, root)
    folder = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            return _openat2(folder, inside)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
            return _open_without_links(folder, inside)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.ELOOP):
            raise OutsideRootError(
                error.errno, f"it leads out of {root}, its adapter_root or store", str(path)
            ) from None
        raise
    finally:
        os.close(folder)


def _openat2(folder: int, path: str) -> int:
    """Opens a path below a folder; the kernel follows only links that stay below it."""
    how = _OpenHow(_FLAGS, 0, _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS)
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    number = errno.EAGAIN
    for _ in range(_NUM_TRIES):
        descriptor: int = syscall(
            ctypes.c_long(OPENAT2), ctypes.c_int(folder), ctypes.c_char_p(os.fsencode(path)),
            ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how)),
        )  # fmt: skip
        if descriptor >= 0:
            return descriptor
        number = ctypes.get_errno()
        if number not in (errno.EAGAIN, errno.EINTR):
            break
    raise OSError(number, os.strerror(number), path)


def _open_without_links(folder: int, path: str) -> int:
    """Opens a path below a folder one name at a time, and refuses every link (ELOOP)."""
    *parents, name = Path(path).parts
    opened: list[int] = []
    try:
        for parent in parents:
            folder = os.open(parent, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            opened.append(folder)
            if stat.S_ISLNK(os.fstat(folder).st_mode):
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        return os.open(name, _FLAGS | os.O_NOFOLLOW, dir_fd=folder)
    finally:
        for descriptor in opened:
            os.close(descriptor)
