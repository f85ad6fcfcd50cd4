"""Downloads the files of one adapter in ranges, and goes on where a connection was cut."""

import hashlib
from pathlib import Path

from loraplex.engine.stores.checksums import write_checksums
from loraplex.engine.stores.deadline import Deadline
from loraplex.engine.stores.remote_files import RemoteFile, RemoteFiles, with_retries

RANGE_BYTES = 4 << 20
MIN_RANGE_BYTES = 256 << 10  # on a slow or broken line


class ChangedFilesError(OSError):
    """The files in the store were replaced while they were downloaded."""


def download(
    remote: RemoteFiles, files: list[RemoteFile], folder: Path, deadline: Deadline
) -> None:
    """Writes the files and their checksums to a folder.

    Raises:
        ChangedFilesError: the store holds other versions of them now.
        OSError: a range failed several times, or no time is left.
    """
    digests = {file.name: _download_file(remote, file, folder, deadline) for file in files}
    now = {file.name: file for file in remote.list(files[0].name, deadline)}
    if any(now.get(file.name) != file for file in files):
        raise ChangedFilesError("the files were replaced while they were downloaded")
    write_checksums(folder, digests)


def _download_file(remote: RemoteFiles, file: RemoteFile, folder: Path, deadline: Deadline) -> str:
    digest = hashlib.blake2b(digest_size=16)
    range_bytes = RANGE_BYTES

    def read_range() -> bytes:
        nonlocal range_bytes
        end = min(start + range_bytes, file.num_bytes)
        range_bytes = max(MIN_RANGE_BYTES, range_bytes // 4)  # of the next attempt, if this fails
        return remote.read(file, start, end, deadline)

    start = 0
    with (folder / file.name).open("wb") as output:
        while start < file.num_bytes:
            data = with_retries(read_range, deadline)
            range_bytes = min(RANGE_BYTES, 2 * len(data))
            output.write(data)
            digest.update(data)
            start += len(data)
    return digest.hexdigest()
