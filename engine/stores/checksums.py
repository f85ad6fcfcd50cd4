"""Keeps the hashes of downloaded files beside them, and compares the files with them."""

import hashlib
import json
from pathlib import Path

CHECKSUM_FILE = ".checksums.json"
CHUNK_BYTES = 1 << 20


def write_checksums(folder: Path, digests: dict[str, str]) -> None:
    """Writes the digests by file name."""
    (folder / CHECKSUM_FILE).write_text(json.dumps(digests), encoding="utf-8")


def is_intact(folder: Path) -> bool:
    """Tells whether the folder holds the files that were downloaded, byte for byte."""
    try:
        digests = json.loads((folder / CHECKSUM_FILE).read_text(encoding="utf-8"))
        return all(digest_of(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, AttributeError):
        return False


def digest_of(path: Path) -> str:
    """Returns the BLAKE2b hash of a file."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
