"""Reads an adapter's changes of the token embedding and the head, and writes them to its pages.

A file may hold a whole embedding or head. Its rows are compared with the base model's, rounded to
the type of the file, and those that differ are kept.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from loraplex.engine.adapters.peft_config import PeftConfigError
from loraplex.engine.adapters.safetensors_file import SafetensorsFile, TensorPlace
from loraplex.engine.adapters.target import AdapterTarget, VocabularyTarget
from loraplex.engine.adapters.vocabulary.tensors import (
    MatrixTensors,
    VocabularyTensors,
    check_num_rows,
)
from loraplex.engine.checkpoint.token_rows import TokenRows
from loraplex.engine.errors import ConfigError
from loraplex.memory.vocabulary_part import VocabularyPart, VocabularyParts, stretch_elems

CHUNK_BYTES = 16 << 20
"""Bytes of a whole matrix that are compared at one time."""


class UnusableRowsError(ValueError):
    """Numbers are NaN or infinite, or out of range of the model's dtype."""


@dataclass(frozen=True, slots=True)
class MatrixChange:
    """The change of the embedding or the head, as it is in the file.

    Attributes:
        by_token: U, [vocabulary, rank].
        by_feature: V, [rank, hidden].
        rows: [len(token_ids), hidden]; `token_ids` ascend.
    """

    name: str
    scale: float = 0.0
    by_token: torch.Tensor | None = None
    by_feature: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    token_ids: tuple[int, ...] = ()

    @property
    def is_empty(self) -> bool:
        return self.by_token is None and self.rows is None

    def hashed(self) -> Iterator[bytes]:
        """Yields the bytes that identify it."""
        tensors = (self.by_token, self.by_feature, self.rows)
        shapes = [f"{t.dtype} {list(t.shape)}" if t is not None else "-" for t in tensors]
        yield f"{self.name} {float(np.float32(self.scale)).hex()} {' '.join(shapes)}\n".encode()
        yield np.array(self.token_ids, dtype="<i8").tobytes()
        for tensor in tensors:
            if tensor is not None:
                yield tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


class VocabularyContent:
    """The changes of one adapter, in memory."""

    def __init__(
        self, embedding: MatrixChange, head: MatrixChange, shares_rows: bool, num_tokens: int
    ) -> None:
        """`shares_rows` and `num_tokens` are those of VocabularyTensors."""
        self._embedding = embedding
        self._head = head
        self._shares_rows = shares_rows
        self._num_tokens = num_tokens

    @property
    def is_empty(self) -> bool:
        return self._embedding.is_empty and self._head.is_empty and not self._num_tokens

    def leaf(self) -> bytes:
        """Returns the part of the content hash; see content_hash.py."""
        size = f" {self._num_tokens}" if self._num_tokens else ""
        digest = hashlib.sha256(f"vocabulary {int(self._shares_rows)}{size}\n".encode())
        for change in (self._embedding, self._head):
            for data in change.hashed():
                digest.update(data)
        return digest.digest()

    def place(self, start: int, target: AdapterTarget) -> tuple[VocabularyParts, int]:
        """Lays the matrices out from element `start` of each layer on. Returns their places, and
        the element behind them."""
        embedding, start = _place(self._embedding, start, target)
        head, start = _place(self._head, start, target)
        if self._shares_rows and embedding is not None and embedding.token_ids:
            head = replace(
                head or VocabularyPart(),
                row_start=embedding.row_start,
                token_ids=embedding.token_ids,
            )
        return VocabularyParts(embedding, head, self._num_tokens), start

    def write(self, data: torch.Tensor, parts: VocabularyParts, target: AdapterTarget) -> None:
        """Writes this rank's part of the matrices to the pages, [layers, elements].

        Raises:
            UnusableRowsError: a number is not finite in the pages' dtype.
        """
        sizes = target.vocabulary
        assert sizes is not None
        for change, part in ((self._embedding, parts.embedding), (self._head, parts.head)):
            if part is None:
                continue
            if change.by_token is not None and change.by_feature is not None:
                own = change.by_token[sizes.tokens.start : sizes.tokens.stop]
                padding = own.new_zeros(sizes.tokens.size - len(own), own.shape[1])
                _write(data, part.token_start, torch.cat((own, padding)), change.name)
                _write(data, part.feature_start, change.by_feature, change.name)
            if change.rows is not None:
                rows = _whole_rows(change.rows, change, sizes.tokens.total)
                _write(data, part.row_start, rows, change.name)


def read_vocabulary(
    file: SafetensorsFile,
    tensors: VocabularyTensors,
    scales: dict[str, float],
    target: AdapterTarget,
) -> VocabularyContent | None:
    """Reads the changes; None if there are none, because all rows equal the base model's.

    Args:
        scales: of the modules with LoRA, by name.

    Raises:
        PeftConfigError: too many rows differ from the base model's.
        DamagedFileError: the file was truncated.
    """
    assert target.vocabulary is not None
    embedding, head = (
        _read_change(file, matrix, scales, target.vocabulary)
        for matrix in (tensors.embedding, tensors.head)
    )
    content = VocabularyContent(embedding, head, tensors.shares_rows, tensors.num_tokens)
    return None if content.is_empty else content


def _read_change(
    file: SafetensorsFile,
    matrix: MatrixTensors,
    scales: dict[str, float],
    sizes: VocabularyTarget,
) -> MatrixChange:
    rows: dict[int, torch.Tensor] = {}
    if matrix.matrix is not None:
        rows |= _differing_rows(file, matrix, sizes)
    if matrix.rows is not None:
        rows |= zip(matrix.token_ids, _read(file, matrix.rows), strict=True)
    check_num_rows(matrix.name, len(rows), sizes)
    token_ids = tuple(sorted(rows))
    change = MatrixChange(
        name=matrix.name,
        rows=torch.stack([rows[token] for token in token_ids]) if rows else None,
        token_ids=token_ids,
    )
    if matrix.by_token is None or matrix.by_feature is None:
        return change
    by_token, by_feature = _read(file, matrix.by_token), _read(file, matrix.by_feature)
    if matrix.is_transposed:
        by_token, by_feature = by_token.t(), by_feature.t()
    return replace(change, by_token=by_token, by_feature=by_feature, scale=scales[matrix.name])


def _differing_rows(
    file: SafetensorsFile, matrix: MatrixTensors, sizes: VocabularyTarget
) -> dict[int, torch.Tensor]:
    """Returns the rows of a whole matrix that differ from the base model's, by token.

    Those of added tokens always do. At most max_rows of them are kept; all are counted.
    """
    place = matrix.matrix
    assert place is not None
    if not sizes.base:
        raise PeftConfigError(
            f"the file holds all rows of {matrix.name}, and the base model's are random: there is "
            "nothing to compare them with"
        )
    found: dict[int, torch.Tensor] = {}
    num_found, width = 0, place.num_bytes // place.shape[0]
    step = max(1, CHUNK_BYTES // width)
    for start in range(0, place.shape[0], step):
        tokens = range(start, min(start + step, place.shape[0]))
        shape = (len(tokens), place.shape[1])
        own = _read(
            file, TensorPlace(place.dtype, shape, place.start + start * width, len(tokens) * width)
        )
        num_known = max(0, min(tokens.stop, sizes.tokens.total) - start)
        base = _base_rows(sizes.base, matrix.name, tokens[:num_known], place.dtype)
        is_other = (own[:num_known].float() != base.float()).any(dim=1)
        differing = [*is_other.nonzero().flatten().tolist(), *range(num_known, len(tokens))]
        num_found += len(differing)
        found |= {start + i: own[i].clone() for i in differing[: sizes.max_rows + 1 - len(found)]}
    check_num_rows(matrix.name, num_found, sizes)
    return found


def _base_rows(base: str, name: str, tokens: range, dtype: torch.dtype) -> torch.Tensor:
    try:
        return _open_base(base).read(name, tokens, dtype)
    except ConfigError as error:
        raise PeftConfigError(f"its {name} cannot be compared with the base: {error}") from None


def _whole_rows(rows: torch.Tensor, change: MatrixChange, num_base: int) -> torch.Tensor:
    """Returns the rows; those of tokens from `num_base` on contain their rows of s U V.

    The pages hold U of the base's tokens alone.
    """
    first = bisect_left(change.token_ids, num_base)
    added = list(change.token_ids[first:])
    if not added or change.by_token is None or change.by_feature is None:
        return rows
    low_rank = change.by_token[added].float() @ change.by_feature.float()
    return torch.cat((rows[:first].float(), rows[first:].float() + change.scale * low_rank))


@lru_cache(maxsize=1)
def _open_base(base: str) -> TokenRows:
    return TokenRows(Path(base))


def _read(file: SafetensorsFile, place: TensorPlace) -> torch.Tensor:
    data = np.empty(place.num_bytes, dtype=np.uint8)
    file.read([(place, data)])
    return torch.from_numpy(data).view(place.dtype).view(place.shape)


def _place(
    change: MatrixChange, start: int, target: AdapterTarget
) -> tuple[VocabularyPart | None, int]:
    sizes = target.vocabulary
    assert sizes is not None
    if change.is_empty:
        return None, start
    rank = 0 if change.by_feature is None else len(change.by_feature)
    num_tokens, width = sizes.tokens.size, sizes.hidden_size

    def take(num_elems: int) -> int:
        nonlocal start
        begin, start = start, start + stretch_elems(num_elems, target.num_layers)
        return begin

    part = VocabularyPart(
        rank=rank,
        scale=float(np.float32(change.scale)),
        token_start=take(rank * num_tokens),
        feature_start=take(rank * width),
        row_start=take(len(change.token_ids) * width),
        token_ids=change.token_ids,
    )
    return part, start


def _write(data: torch.Tensor, start: int, matrix: torch.Tensor, name: str) -> None:
    """Deals a matrix to the layers of `data`, [layers, elements], from element `start` on."""
    values = matrix.to(data.dtype).flatten()
    if not bool(values.isfinite().all()):
        raise UnusableRowsError(
            f"{name} holds NaN or infinite values, or some that {data.dtype} cannot"
        )
    stretch = stretch_elems(len(values), len(data))
    padded = values.new_zeros(len(data) * stretch)
    padded[: len(values)] = values
    data[:, start : start + stretch] = padded.view(len(data), stretch)
