"""Takes adapters' tensors from clients, and holds them until the scheduler has opened them."""

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from loraplex.engine.adapters.tensors.memory_file import (
    MemoryFile,
    UnreachableMemoryError,
    open_memory_file,
)
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ClientError, client_error
from loraplex.engine.frontend.uploads.upload_request import LoadAdapterTensorsRequest
from loraplex.engine.ipc.channel import Wakeup
from loraplex.engine.ipc.messages.frontend import AdapterMemory

Frames = Sequence["bytes | memoryview"]
Taken = Callable[[AdapterMemory | ClientError], None]


@dataclass(slots=True)
class _Held:
    """Descriptors of this process, and bytes of the frames, that one load holds."""

    descriptors: tuple[int, ...] = ()
    num_bytes: int = 0


class AdapterUploads:
    """Puts tensors into memory files. One thread writes; large frames never hold up the others.

    Loads are known by the id of the query that waits for them.
    """

    def __init__(self, config: EngineConfig, wakeup: Wakeup) -> None:
        """`wakeup` is set when run_ready() has something to do."""
        endpoint = config.server.endpoint
        self._is_allowed = config.server.allow_adapter_upload or not endpoint.startswith("tcp")
        self._max_bytes = config.memory.adapter_host_bytes
        self._wakeup = wakeup
        self._held: dict[int, _Held] = {}
        self._num_bytes = 0  # of all frames
        self._written: deque[tuple[int, MemoryFile | ClientError, bytes, Taken]] = deque()
        self._writer = ThreadPoolExecutor(1, "adapter-upload")

    def take(
        self, query_id: int, message: LoadAdapterTensorsRequest, frames: Frames, then: Taken
    ) -> None:
        """Calls `then` with the memory, or with the reason why not: now, or from run_ready().

        The memory is held until release().

        Raises:
            ClientError: the server takes no tensors, or not so many bytes.
        """
        if not self._is_allowed:
            raise client_error(
                "forbidden",
                "this server takes no tensors over TCP: start it with --allow-adapter-upload, or "
                "at an ipc:// endpoint, or load the adapter from a folder",
            )
        if message.memory is not None:
            if frames:
                raise ClientError("give memory or frames with the tensors, not both")
            self._take_memory(query_id, message, then)
            return
        num_bytes = sum(map(len, frames))
        if not num_bytes:
            raise ClientError("the frames after the message must hold the tensors")
        self._check_size(num_bytes)
        if self._num_bytes + num_bytes > self._max_bytes:
            raise client_error("queue_full", "other adapters are being sent: try again later")
        self._held[query_id] = _Held(num_bytes=num_bytes)
        self._num_bytes += num_bytes
        self._writer.submit(self._write, query_id, frames, message.config, then)

    def run_ready(self) -> None:
        """Hands out what was written."""
        while self._written:
            query_id, file, config, then = self._written.popleft()
            if isinstance(file, ClientError):
                then(file)
            elif query_id not in self._held:  # released meanwhile
                file.close()
            else:
                self._hand_out(query_id, file.fd, config, then)

    def release(self, query_id: int) -> None:
        """Lets go of a load's memory. Ignores loads that it does not know."""
        held = self._held.pop(query_id, _Held())
        self._num_bytes -= held.num_bytes
        for descriptor in held.descriptors:
            os.close(descriptor)

    def close(self) -> None:
        """Lets go of everything."""
        self._writer.shutdown(wait=True, cancel_futures=True)
        for query_id in list(self._held):
            self.release(query_id)
        self.run_ready()

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise client_error(
                "too_large",
                f"the tensors have {num_bytes} bytes, the server keeps {self._max_bytes}: send "
                "less, or raise adapter_host_bytes of the server",
            )

    def _take_memory(self, query_id: int, message: LoadAdapterTensorsRequest, then: Taken) -> None:
        assert message.memory is not None
        try:
            descriptor = open_memory_file(message.memory)
        except UnreachableMemoryError as error:
            raise client_error("unreachable_memory", str(error)) from None
        try:
            self._check_size(os.fstat(descriptor).st_size)
        except ClientError:
            os.close(descriptor)
            raise
        self._hand_out(query_id, descriptor, message.config, then)

    def _write(self, query_id: int, frames: Frames, config: bytes, then: Taken) -> None:
        file: MemoryFile | ClientError
        try:
            file = MemoryFile.of(frames)
        except OSError as error:
            file = client_error("adapter", f"there is no memory for the tensors: {error}")
        self._written.append((query_id, file, config, then))
        self._wakeup.set()

    def _hand_out(self, query_id: int, tensors_fd: int, config: bytes, then: Taken) -> None:
        held = self._held.setdefault(query_id, _Held())
        held.descriptors = (tensors_fd,)
        try:
            config_fd = MemoryFile.of([config]).fd
        except OSError as error:
            then(client_error("adapter", f"there is no memory for the adapter: {error}"))
            return
        held.descriptors = (config_fd, tensors_fd)
        then(AdapterMemory(os.getpid(), config_fd, tensors_fd))
