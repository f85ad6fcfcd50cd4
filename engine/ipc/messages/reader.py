"""Messages between a worker and the process that reads its adapters."""

from loraplex.memory.vocabulary_part import VocabularyPart
from loraplex.scheduler.worker_protocol import (
    Float32Array,
    Int32Array,
    Int64Array,
    Message,
    Record,
    int_array,
)


class ReaderStart(Message):
    """First message to the reader: the worker's AdapterTarget."""

    num_layers: int
    module_names: list[str]  # for each module: name, parent, axis of the inputs, of the outputs
    module_numbers: Int32Array
    """For each module: group, 1 if it has a bias, and the four numbers of a Piece for its inputs
    and for its outputs."""
    page_elems: int
    dtype: str
    weight_dtype: str  # of A and B
    max_rank: int
    adapter_roots: list[str]
    vocabulary_numbers: Int32Array
    """A VocabularyTarget's Piece (four numbers), hidden_size, is_tied and max_rows; or nothing."""
    base: str  # of a VocabularyTarget


class ReadAdapter(Message):
    """Answered by AdapterPacked or ReadFailed, after a NeedMemory if there is data to pack."""

    name: str
    path: str


class OpenFolder(Message):
    """Asks for this node's copy of an adapter's folder. Answered by FolderOpened or ReadFailed."""

    path: str


class FolderOpened(Message):
    """The files in `path` stay as they are until the connection is closed."""

    path: str


class NeedMemory(Message):
    """Answered by HostMemory, with the slab's file descriptor, or by NoMemory."""

    num_bytes: int


class HostMemory(Message):
    """Where to pack. `live_slabs`, of which this is one, have to stay mapped."""

    slab_id: int
    slab_bytes: int
    offset: int
    live_slabs: Int64Array


class NoMemory(Message):
    """The worker has no room for the adapter; it reports the reason itself."""


class PackedPart(Record):
    """A VocabularyPart."""

    rank: int
    scale: float
    token_start: int
    feature_start: int
    row_start: int
    token_ids: Int32Array

    @classmethod
    def of(cls, part: VocabularyPart | None) -> "PackedPart | None":
        """Returns the record of a part, or None of none."""
        if part is None:
            return None
        starts = (part.token_start, part.feature_start, part.row_start)
        return cls(part.rank, part.scale, *starts, int_array(part.token_ids))

    def part(self) -> VocabularyPart:
        """Returns the part."""
        return VocabularyPart(
            rank=self.rank,
            scale=self.scale,
            token_start=self.token_start,
            feature_start=self.feature_start,
            row_start=self.row_start,
            token_ids=tuple(self.token_ids),
        )


class AdapterPacked(Message):
    """The fields of a PackedAdapter with flat tables; its data is where HostMemory said."""

    content_hash: str
    num_pages: int
    rank: Int32Array
    a_start: Int32Array
    b_start: Int32Array
    gain_start: Int32Array
    shift_start: Int32Array
    scale: Float32Array
    replaces_bias: bool
    embedding: PackedPart | None
    head: PackedPart | None
    num_tokens: int  # of VocabularyParts


class ReadFailed(Message):
    """The read failed.

    `is_refused`: the adapter is at fault, and `text` is for its user. Otherwise reading it again
    may work.
    """

    text: str
    is_refused: bool
