"""Opens the folders of adapters, which may be copies of folders on another machine."""

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from loraplex.engine.adapters.reader_error import ReaderError
from loraplex.engine.errors import AdapterError
from loraplex.engine.ipc import codec
from loraplex.engine.ipc.messages.reader import FolderOpened, OpenFolder

ANSWER_LIMIT_S = 100.0
MAX_MESSAGE_BYTES = 64 << 10


class AdapterFolders:
    """Finds the files of an adapter by the path that the router knows. Usable from any thread."""

    def __init__(self, server: str = "") -> None:
        """`server` is a socket of ChildStart.folder_server; "": every path is of this machine."""
        self._server = server

    @contextmanager
    def open(self, path: str) -> Iterator[Path]:
        """Yields the folder to read, whose files are there until the end.

        Raises:
            AdapterError: there is no such folder, or the caller has raised it. It names `path`.
            ReaderError: the files cannot be had now.
        """
        if not self._server:
            yield Path(path)
            return
        with closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as connection:
            folder = self._ask(connection, path)
            try:
                yield Path(folder)
            except AdapterError as error:
                raise AdapterError(str(error).replace(folder, path)) from error

    def _ask(self, connection: socket.socket, path: str) -> str:
        connection.settimeout(ANSWER_LIMIT_S)
        try:
            connection.connect(self._server)
            connection.send(codec.encode(OpenFolder(path)))
            data = connection.recv(MAX_MESSAGE_BYTES)
        except OSError as error:
            raise ReaderError(f"{path} cannot be asked for on this node: {error}") from error
        if not data:
            raise ReaderError(f"{path} cannot be asked for on this node: the engine ends")
        answer = codec.decode(data)
        if isinstance(answer, FolderOpened):
            return answer.path
        raise (AdapterError if answer.is_refused else ReaderError)(answer.text)
