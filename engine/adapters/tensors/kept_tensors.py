"""Keeps the adapters that clients send as tensors, as long as the engine may read them.

The scheduler's process holds the descriptors of their memory files, and the workers read the files
through it. Every check of an adapter's files applies to them.
"""

import os
import weakref

from loraplex.engine.adapters.tensors.memory_folder import memory_folder
from loraplex.engine.ipc.messages.frontend import AdapterMemory
from loraplex.scheduler.frontend_protocol import AdapterSource
from loraplex.scheduler.request import RequestRefused


class KeptTensors:
    """Memory files of adapters, `max_bytes` in all.

    An adapter's files are freed with the AdapterSource that adopt() returned: when no version of
    the adapter refers to it any more.

    Attributes:
        num_bytes: size of all files that are kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.num_bytes = 0

    def adopt(self, memory: AdapterMemory) -> AdapterSource:
        """Opens the files that a frontend holds, and returns their place for the workers.

        Raises:
            RequestRefused: there is no room for them, or the frontend has died.
        """
        descriptors: list[int] = []
        try:
            for fd in (memory.config_fd, memory.tensors_fd):
                path = f"/proc/{memory.pid}/fd/{fd}"
                descriptors.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            num_bytes = sum(os.fstat(fd).st_size for fd in descriptors)
            self._check_room(num_bytes)
        except OSError as error:
            _close(descriptors)
            text = f"the tensors that were sent cannot be kept: {error}; send them again"
            raise RequestRefused("adapter", text) from None
        except BaseException:
            _close(descriptors)
            raise
        self.num_bytes += num_bytes
        path = memory_folder(os.getpid(), *descriptors)
        source = AdapterSource(path, path, is_memory=True)
        weakref.finalize(source, self._free, descriptors, num_bytes).atexit = False
        return source

    def _check_room(self, num_bytes: int) -> None:
        if self.num_bytes + num_bytes > self._max_bytes:
            raise RequestRefused(
                "adapter",
                f"the tensors have {num_bytes} bytes, and adapters of clients hold "
                f"{self.num_bytes} of {self._max_bytes}: unload some, or raise adapter_host_bytes",
            )

    def _free(self, descriptors: list[int], num_bytes: int) -> None:
        _close(descriptors)
        self.num_bytes -= num_bytes


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
