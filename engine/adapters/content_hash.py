"""The identity of an adapter: a hash of its tensors as they are in the file, and of their scales.

The hash does not depend on the model's dtype, on the worker rank, or on the layout in pages. Names
of files, the order of tensors in the file, metadata, and fields of the configuration that do not
change the forward pass do not enter it either.

For each adapted layer, a leaf is the SHA-256 of a line of text for each module (layer, name, scale,
dtype and shape of A and of B), then of the bytes of each module's A and B. A magnitude and a bias
follow A and B in both, behind their labels in the line. Modules go in the order of their names. The
content hash is the SHA-256 of the version tag and of the leaves, in the order of the layers. The
shape of A gives the rank. Changes of the token embedding and the head are one more leaf, the last
one (engine/adapters/vocabulary/content.py). Leaves let several threads hash one adapter. A thread
lets go of the interpreter for each call of the hash, so the bytes of a layer are one call.
"""

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loraplex.engine.adapters.safetensors_file import ByteArray, TensorPlace

MAX_KNOWN = 1 << 16
SETTLE_S = 2.0

_VERSION = b"loraplex adapter 2\n"

Stamp = tuple[tuple[int, ...], ...]
"""The result of safetensors_file.stamp() for each file of an adapter."""


@dataclass(frozen=True, slots=True)
class HashedModule:
    """One adapted module: its name within the layer, and its labelled tensors: A and B without a
    label, then a magnitude and a bias, if it has them.

    `scale` multiplies B A x. It is the float32 value that the kernels use.
    """

    name: str
    scale: float
    tensors: tuple[tuple[str, TensorPlace], ...]


def hash_layer(layer: int, modules: Sequence[HashedModule], data: ByteArray) -> bytes:
    """Returns the leaf of one layer.

    Args:
        modules: in the order of their names.
        data: contiguous; the tensors of each module, one after another.
    """
    lines = [
        f"{layer} {module.name} {float(module.scale).hex()} {_describe(module)}\n"
        for module in modules
    ]
    digest = hashlib.sha256("".join(lines).encode())
    digest.update(data.data)
    return digest.digest()


def _describe(module: HashedModule) -> str:
    return " ".join(
        f"{label} {place.dtype} {list(place.shape)}".lstrip() for label, place in module.tensors
    )


def hash_adapter(leaves: Sequence[bytes]) -> str:
    """Returns the content hash, 64 hex digits, of the leaves of the adapted layers in order."""
    return hashlib.sha256(_VERSION + b"".join(leaves)).hexdigest()


class ContentHashCache:
    """Remembers the content hash of files that were read before. Thread-safe.

    An entry is valid while device, inode, size, mtime and ctime of every file are unchanged. Only
    the superuser can set ctime. A change that keeps all five must therefore fall into the same tick
    of the file system's clock as the read, so the hash of a file that changed less than SETTLE_S
    ago is not remembered.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[Path, tuple[Stamp, str]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: Path, files: Stamp) -> str | None:
        with self._lock:
            known = self._known.get(path)
            if known is None or known[0] != files:
                return None
            self._known.move_to_end(path)
            return known[1]

    def remember(self, path: Path, files: Stamp, content_hash: str) -> None:
        newest = max(max(times[-2:]) for times in files)
        if time.time_ns() - newest < SETTLE_S * 1e9:
            return
        with self._lock:
            self._known[path] = (files, content_hash)
            self._known.move_to_end(path)
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
