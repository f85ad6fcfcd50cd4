"""The plan of a step for the BGMV kernels: its kinds and its memory layout. Host side, numpy."""

from dataclasses import dataclass

import numpy as np

from loraplex.backends.launch.buffers import PooledBuffer
from loraplex.backends.lora.contract import Int32Array, LoRABatch, LoRAGroup, LoRATable
from loraplex.backends.lora.tiles import make_tiles, module_ranks, split_ranks

MAX_SPLITS = 16
ITEM_RANKS = 16
SHRINK_WARPS = 8
EXPAND_THREADS = 128
GRAPH_ROWS = 1024
"""Plans of up to this many rows have one memory layout, whatever they hold. Graphs need that."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How the kernels of one kind of batch are compiled and launched."""

    item_rows: int  # of shrink, 8 or 16
    tile_rows: int  # of expand: few, or the 16 of the matrix unit
    shrink_blocks: int  # resident on each processor; K is split until this many have work
    expand_blocks: int  # of a launch, for each processor, at most
    rows_per_tile: int  # that expand's grid assumes; blocks loop if there are more tiles

    @property
    def columns(self) -> int:
        """Columns of a block of expand: 8 a thread, on the matrix unit 64 a warp."""
        return EXPAND_THREADS * (2 if self.tile_rows == 16 else 8)


KINDS = {
    "distinct": Kind(8, 1, shrink_blocks=3, expand_blocks=16, rows_per_tile=1),
    "shared": Kind(8, 4, shrink_blocks=3, expand_blocks=3, rows_per_tile=1),
    "many": Kind(16, 16, shrink_blocks=2, expand_blocks=4, rows_per_tile=4),
}
"""distinct: no two rows have the same adapter; many: MANY_ROWS an adapter or more, on average."""
MANY_ROWS = 4


def choose_kind(batch: LoRABatch) -> str:
    """Returns the name in KINDS that runs the batch fastest."""
    num_rows, num_adapters = len(batch.token_order), len(batch.segment_slots)
    if num_rows == num_adapters:
        return "distinct"
    return "many" if num_rows >= MANY_ROWS * num_adapters else "shared"


@dataclass(frozen=True, slots=True)
class BGMVPlan:
    """A LoRAPlan. Its arrays lie at `address` on the device."""

    kind: str
    table: LoRATable
    address: int
    capacity: int  # rows that its parts have room for
    buffer: PooledBuffer | None  # owns the arrays; None: they are static

    @property
    def family(self) -> str:
        return "bgmv"


@dataclass(frozen=True, slots=True)
class PlanLayout:
    """Lays plans out in memory, for one op.

    Attributes:
        max_rows: rows that the scratch memory of x A holds, times splits of K.
        unit: input features that a warp of shrink takes at a time.
    """

    groups: tuple[LoRAGroup, ...]
    max_rank: int
    max_rows: int
    num_processors: int
    unit: int

    @property
    def items_per_row(self) -> int:
        return -(-self.max_rank // ITEM_RANKS)

    def num_bytes(self, capacity: int) -> int:
        """Returns the device memory of a plan with room for `capacity` rows."""
        return 16 * (1 + len(self.groups)) + capacity * (16 * self.items_per_row + 16 + 4)

    def arrays(
        self, kind: Kind, capacity: int, table: LoRATable, batch: LoRABatch
    ) -> dict[str, Int32Array]:
        """Returns the parts of a plan in the order in which bgmv.cu reads them."""
        starts, slots = batch.segment_starts, batch.segment_slots
        ranks = module_ranks(table.host_rank.numpy(), slots)
        slot_ranks = np.zeros(table.host_rank.shape[2], dtype=np.int32)
        slot_ranks[slots] = ranks.max(axis=0)
        items = split_ranks(make_tiles(starts, slots, kind.item_rows), slot_ranks, ITEM_RANKS)
        tiles, num_rows = make_tiles(starts, slots, kind.tile_rows), len(batch.token_order)
        tiles_at = 4 + 4 * len(self.groups)
        order_at = tiles_at + 4 * capacity
        fixed = np.zeros(order_at + capacity, dtype=np.int32)
        fixed[:3] = len(items), len(tiles), num_rows
        if num_rows:
            fill = kind.shrink_blocks * self.num_processors
            for index, group in enumerate(self.groups):
                at = 4 + 4 * index
                wanted = fill // max(1, len(items) * len(group.modules))
                touched = ranks[group.modules[0] : group.modules[-1] + 1].any()
                fixed[at : at + 4] = (
                    *_split_k(group, min(wanted, self.max_rows // num_rows), self.unit), touched,
                )  # fmt: skip
        fixed[tiles_at : tiles_at + tiles.size] = tiles.reshape(-1)
        fixed[order_at : order_at + num_rows] = batch.token_order
        return {"fixed": fixed, "items": items}


def _split_k(group: LoRAGroup, wanted: int, unit: int) -> tuple[int, int, int]:
    """Returns the number of splits of K, the units of input features in each, and the binary
    logarithm of the power of two that the number was rounded to before empty splits were left out.
    """
    units = -(-group.in_features // unit)
    shift = max(1, min(wanted, MAX_SPLITS, units // SHRINK_WARPS)).bit_length() - 1
    per_split = -(-units // (1 << shift))
    return -(-units // per_split), per_split, shift
