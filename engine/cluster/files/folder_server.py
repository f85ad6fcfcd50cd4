"""Gives the workers of an engine the folders of adapters that they ask for."""

import contextlib
import logging
import os
import socket
import threading

from loraplex.engine.adapters.adapter_folders import MAX_MESSAGE_BYTES
from loraplex.engine.cluster.files.node_files import NodeFiles
from loraplex.engine.errors import AdapterError
from loraplex.engine.ipc import codec
from loraplex.engine.ipc.messages.reader import FolderOpened, OpenFolder, ReadFailed

logger = logging.getLogger("loraplex.cluster")


class FolderServer:
    """Listens on a Unix socket. A copy is kept as long as its connection is open."""

    def __init__(self, files: NodeFiles, path: str) -> None:
        """Binds `path`, which must not exist. Raises OSError if that fails."""
        self._files = files
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(path)
        self._listener.listen()
        threading.Thread(target=self._accept, name="adapter folders", daemon=True).start()

    def close(self) -> None:
        """Accepts nothing any more, and ends the copies that are being made. Idempotent."""
        self._files.close()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(
                target=self._serve, args=(connection,), name="adapter folder", daemon=True
            ).start()

    def _serve(self, connection: socket.socket) -> None:
        copy = None
        with contextlib.closing(connection), contextlib.suppress(OSError, codec.WireError):
            message = codec.decode(connection.recv(MAX_MESSAGE_BYTES))
            assert isinstance(message, OpenFolder)
            answer: FolderOpened | ReadFailed
            try:
                copy = self._files.open(message.path)
                answer = FolderOpened(str(copy.path) if copy is not None else message.path)
            except AdapterError as error:
                answer = ReadFailed(str(error), is_refused=True)
            except Exception as error:
                logger.warning("%s cannot be copied now: %s", message.path, error)
                answer = ReadFailed(f"{message.path}: {error}", is_refused=False)
            try:
                connection.send(codec.encode(answer))
                connection.recv(1)  # until the worker is done, or has ended
            finally:
                if copy is not None:
                    copy.release()
