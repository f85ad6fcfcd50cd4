"""Errors of reading an adapter that pass by themselves, so that reading it again is worth it."""

import errno

_TRANSIENT = frozenset({
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.EINTR, errno.EBUSY,
    errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO,
    errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN,
    errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ESHUTDOWN,
    errno.ETXTBSY, errno.ENOLINK, errno.ECOMM,
})  # fmt: skip


class ReaderError(RuntimeError):
    """Reading failed, and the adapter is not the cause. Reading it again may work."""


def is_transient(error: OSError) -> bool:
    """Tells whether the system, a disk or a network is at fault, not the files."""
    return error.errno in _TRANSIENT
