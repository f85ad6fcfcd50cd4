"""The adapter commands of clients that have succeeded, in a file that all routers share.

Each router appends its own commands and reads those of the others. A router that starts again reads
the file from its beginning.
"""

import errno
import fcntl
import os
from pathlib import Path
from typing import BinaryIO

from loraplex.engine.ipc.child import frame, read_frame
from loraplex.engine.ipc.messages.frontend import AdapterCommand


class AdapterLog:
    """Appends commands, and tells which ones are new."""

    def __init__(self, path: Path) -> None:
        """Creates the file if it is missing."""
        self._file: BinaryIO = open(path, "a+b", buffering=0)  # noqa: SIM115, open until the end
        self._num_read = 0

    def append(self, command: AdapterCommand) -> None:
        """Adds a command at the end, in the order of all routers.

        Raises OSError if the disk is full. The file is as it was then: half a command in it would
        make all that come later unreadable.
        """
        data = frame(command)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            end = os.fstat(self._file.fileno()).st_size
            num_written = 0
            try:
                num_written = self._file.write(data)
            finally:
                if num_written < len(data):
                    os.ftruncate(self._file.fileno(), end)
            if num_written < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def read(self) -> list[AdapterCommand]:
        """Returns the commands since the last call, own ones too."""
        if os.fstat(self._file.fileno()).st_size == self._num_read:
            return []
        fcntl.flock(self._file, fcntl.LOCK_SH)
        try:
            self._file.seek(self._num_read)
            commands = []
            while (command := read_frame(self._file)) is not None:
                commands.append(command)
            self._num_read = self._file.tell()
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        return commands
