"""Backend ``cupy`` of op ``lora``: BGMV raw kernels, bound by the bytes of the adapters' weights.

CuPy compiles the CUDA source through NVRTC when the backend is made, two kernels for each kind
of batch and group of projections, and caches the binaries; launches go to torch's current stream.
Input and output sizes must be multiples of 8 (16-byte vectors).
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from importlib import resources

import cupy
import numpy as np
import torch

from loraplex.backends.launch.cuda import Launch, current_stream
from loraplex.backends.launch.upload import Uploader
from loraplex.backends.lora.contract import (
    Int32Array,
    LoRABatch,
    LoRAGroup,
    LoRASpec,
    LoRATable,
    row_stride,
)
from loraplex.backends.lora.tiles import largest_ranks, make_tiles, split_ranks

MAX_SPLITS = 16
ITEM_RANKS = 16
SHRINK_WARPS = 8
EXPAND_THREADS = 128
GRAPH_ROWS = 512
"""Plans of up to so many rows lie in memory alike, whatever they hold: graphs need that."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """How the kernels are compiled and launched, for one kind of batch."""

    item_rows: int  # of shrink, 8 or 16
    tile_rows: int  # of expand: few, or the 16 of the matrix unit
    shrink_blocks: int  # resident on each processor; K is split until so many have work
    expand_blocks: int  # of a launch for each processor, at most
    rows_per_tile: int  # that expand's grid counts on; blocks loop if there are more tiles

    @property
    def columns(self) -> int:
        """Of a block of expand: a thread takes eight, on the matrix unit a warp takes 64."""
        return EXPAND_THREADS * (2 if self.tile_rows == 16 else 8)


_KINDS = {
    "distinct": _Kind(8, 1, shrink_blocks=3, expand_blocks=16, rows_per_tile=1),
    "shared": _Kind(16, 4, shrink_blocks=2, expand_blocks=3, rows_per_tile=1),
    "many": _Kind(16, 16, shrink_blocks=2, expand_blocks=4, rows_per_tile=4),
}
"""distinct: no two rows have the same adapter; many: MANY_ROWS an adapter or more, on average."""
MANY_ROWS = 4


@dataclass(frozen=True, slots=True)
class _Kernels:
    """Of one group: the driver's handles."""

    shrink: int
    expand: int


@dataclass(frozen=True, slots=True)
class _Launches:
    """Of one layer, group and kind; x, y and their strides are set each time.

    Blocks of shrink are `shrink_blocks`, or one for each row and module if these are more; blocks
    of expand one for each panel of columns and `rows_per_tile` rows, `expand_blocks` at most.
    """

    shrink: Launch
    expand: Launch
    num_modules: int
    num_panels: int
    rows_per_tile: int
    shrink_blocks: int
    expand_blocks: int


class CupyBGMV:
    name = "cupy"
    family = "bgmv"
    graph_kinds: tuple[str, ...] = tuple(_KINDS)
    max_graph_rows = GRAPH_ROWS

    @staticmethod
    def probe(spec: LoRASpec | None = None) -> str | None:
        """None when usable, else the reason."""
        if not torch.cuda.is_available():
            return "it needs a CUDA device"
        if torch.cuda.get_device_capability()[0] < 8:
            return "it needs compute capability 8.0 or later"
        if spec is None:
            return None
        if spec.device.type != "cuda":
            return f"it needs a CUDA device, not {spec.device.type}"
        if spec.dtype not in (torch.float16, torch.bfloat16):
            return f"it takes float16 or bfloat16, not {spec.dtype}"
        sizes = {n for group in spec.groups for n in (group.in_features, *group.out_features)}
        odd = sorted(size for size in sizes if size % 8)
        return f"it takes multiples of 8 features, not {odd}" if odd else None

    def __init__(self, spec: LoRASpec) -> None:
        properties = torch.cuda.get_device_properties(spec.device)
        self._spec = spec
        self._num_processors = properties.multi_processor_count
        self._pdl = properties.major >= 9
        self._kernels = {(k, g): self._compile(k, g) for k in _KINDS for g in spec.groups}
        self._items_per_row = -(-spec.max_rank // ITEM_RANKS)
        self._v_module_stride = self._items_per_row * ITEM_RANKS
        self._v_row_stride = 3 * self._v_module_stride
        self._capacity = -(-max(spec.max_num_tokens, GRAPH_ROWS) // 4) * 4  # 16-byte items follow
        self._v = torch.empty(
            self._capacity * self._v_row_stride, dtype=torch.float32, device=spec.device
        )
        num_bytes = 16 * (1 + len(spec.groups))
        num_bytes += self._capacity * (16 * self._items_per_row + 16 + 4)
        self._plan = torch.zeros(num_bytes, dtype=torch.uint8, device=spec.device)
        self._uploader = Uploader(spec.device)
        self._kind = "shared"
        self._capacity_planned = ctypes.c_int32(0)  # shared by all launches
        self._device_index = self._plan.get_device()
        self._launches: dict[tuple[str, int, int], _Launches] = {}
        self._table: LoRATable | None = None
        self._pool: torch.Tensor | None = None

    def kind_of(self, *, table: LoRATable, batch: LoRABatch) -> str:
        num_rows, num_adapters = len(batch.token_order), len(batch.segment_slots)
        if num_rows == num_adapters:
            return "distinct"
        return "many" if num_rows >= MANY_ROWS * num_adapters else "shared"

    def plan(self, *, table: LoRATable, batch: LoRABatch, kind: str | None = None) -> None:
        self._kind = kind or self.kind_of(table=table, batch=batch)
        is_small = batch.num_tokens <= GRAPH_ROWS
        self._capacity_planned.value = GRAPH_ROWS if is_small else self._capacity
        self._uploader.upload(self._plan_arrays(table, batch), out=self._plan)

    def shrink(
        self, *, x: torch.Tensor, pool: torch.Tensor, layer: int, group: LoRAGroup, table: LoRATable
    ) -> None:
        launches = self._launches_of(layer, group, table, pool)
        launch = launches.shrink
        launch.pointers[0], launch.integers[0] = x.data_ptr(), x.stride()[0]
        num_blocks = max(x.shape[0] * launches.num_modules, launches.shrink_blocks)
        launch.enqueue(num_blocks, current_stream(self._device_index))

    def expand(
        self, *, y: torch.Tensor, pool: torch.Tensor, layer: int, group: LoRAGroup, table: LoRATable
    ) -> None:
        launches = self._launches_of(layer, group, table, pool)
        launch = launches.expand
        launch.pointers[0], launch.integers[0] = y.data_ptr(), y.stride()[0]
        num_tiles = -(-y.shape[0] // launches.rows_per_tile)
        num_blocks = min(num_tiles * launches.num_panels, launches.expand_blocks)
        launch.enqueue(num_blocks, current_stream(self._device_index))

    def _launches_of(
        self, layer: int, group: LoRAGroup, table: LoRATable, pool: torch.Tensor
    ) -> _Launches:
        if table is not self._table or pool is not self._pool:
            self._launches.clear()  # they keep the addresses and strides of one table and one pool
            self._table, self._pool = table, pool
        key = (self._kind, layer, group.modules[0])
        launches = self._launches.get(key)
        if launches is None:
            launches = self._launches[key] = self._prepare(layer, group, table, pool)
        return launches

    def _prepare(
        self, layer: int, group: LoRAGroup, table: LoRATable, pool: torch.Tensor
    ) -> _Launches:
        """Of the planned kind."""
        kind, kernels = _KINDS[self._kind], self._kernels[self._kind, group]
        first = group.modules[0]
        common = (
            pool[layer].data_ptr(), self._plan.data_ptr(), table.page_table.data_ptr(),
            table.rank[layer, first].data_ptr(),
        )  # fmt: skip
        integers = (0, table.page_table.stride(0), table.rank.stride(2), table.rank.stride(1))
        rest = (
            self._capacity_planned, ctypes.c_int32(self._v_row_stride),
            ctypes.c_int32(self._v_module_stride),
        )  # fmt: skip
        shrink = Launch(
            kernels.shrink, num_threads=SHRINK_WARPS * 32, pdl=self._pdl,
            pointers=(0, self._v.data_ptr(), *common, table.a_start[layer, first].data_ptr()),
            integers=integers, rest=rest,
        )  # fmt: skip
        expand = Launch(
            kernels.expand, num_threads=EXPAND_THREADS, pdl=self._pdl,
            pointers=(0, self._v.data_ptr(), *common, table.b_start[layer, first].data_ptr(),
                      table.scale[layer, first].data_ptr()),
            integers=integers, rest=rest,
        )  # fmt: skip
        return _Launches(
            shrink, expand, num_modules=len(group.modules),
            num_panels=sum(-(-out // kind.columns) for out in group.out_features),
            rows_per_tile=kind.rows_per_tile,
            shrink_blocks=self._num_processors * kind.shrink_blocks,
            expand_blocks=self._num_processors * kind.expand_blocks,
        )  # fmt: skip

    def _compile(self, kind: str, group: LoRAGroup) -> _Kernels:
        macros = _make_macros(self._spec, _KINDS[kind], group, self._pdl)
        return _compile(macros, self._spec.device.index or 0)

    def _plan_arrays(self, table: LoRATable, batch: LoRABatch) -> dict[str, Int32Array]:
        """The plan as bgmv.cu reads it, part after part."""
        kind, capacity = _KINDS[self._kind], self._capacity_planned.value
        starts, slots = batch.segment_starts, batch.segment_slots
        slot_ranks = largest_ranks(table.host_rank.numpy(), slots)
        items = split_ranks(make_tiles(starts, slots, kind.item_rows), slot_ranks, ITEM_RANKS)
        tiles, num_rows = make_tiles(starts, slots, kind.tile_rows), len(batch.token_order)
        tiles_at = 4 + 4 * len(self._spec.groups)
        order_at = tiles_at + 4 * capacity
        fixed = np.zeros(order_at + capacity, dtype=np.int32)
        fixed[:3] = len(items), len(tiles), num_rows
        if num_rows:
            room = self._capacity // num_rows
            for index, group in enumerate(self._spec.groups):
                at = 4 + 4 * index
                fixed[at : at + 3] = self._split_k(group, len(items), room)
        fixed[tiles_at : tiles_at + tiles.size] = tiles.reshape(-1)
        fixed[order_at : order_at + num_rows] = batch.token_order
        return {"fixed": fixed, "items": items}

    def _split_k(self, group: LoRAGroup, num_items: int, room: int) -> tuple[int, int, int]:
        """Splits, units of 64 input features in each, and the logarithm of the power of two that
        the splits were meant to be: as many as fill the chip, and no more than scratch memory of
        `room` times the rows can hold."""
        units = -(-group.in_features // 64)
        fill = _KINDS[self._kind].shrink_blocks * self._num_processors
        most = min(fill // max(1, num_items * len(group.modules)), room)
        shift = max(1, min(most, MAX_SPLITS, units // SHRINK_WARPS)).bit_length() - 1
        per_split = -(-units // (1 << shift))
        return -(-units // per_split), per_split, shift


def _make_macros(spec: LoRASpec, kind: _Kind, group: LoRAGroup, pdl: bool) -> tuple[str, ...]:
    """What bgmv.cu is compiled with for one group, as compiler options."""
    outs, starts = (*group.out_features, 0, 0), (*group.out_starts, 0, 0)
    values = {
        "BF16": int(spec.dtype == torch.bfloat16), "PDL": int(pdl), "PAGE": spec.page_elems,
        "NUM_MODULES": len(group.modules), "K": group.in_features,
        "K_ROW": row_stride(group.in_features), "GROUP": spec.groups.index(group),
        "NUM_GROUPS": len(spec.groups),
        "MAX_SPLITS": MAX_SPLITS, "MAX_RANK": spec.max_rank,
        "NT": kind.item_rows // 8, "WARPS": SHRINK_WARPS,
        "OUT_0": outs[0], "OUT_1": outs[1], "OUT_2": outs[2], "START_1": starts[1],
        "START_2": starts[2], "ROWS": kind.tile_rows, "THREADS": EXPAND_THREADS,
    }  # fmt: skip
    return tuple(f"-D{name}={value}" for name, value in values.items())


@cache
def _compile(macros: tuple[str, ...], device_index: int) -> _Kernels:
    source = resources.files("loraplex.backends.lora.bgmv").joinpath("bgmv.cu").read_text()
    with cupy.cuda.Device(device_index):
        module = cupy.RawModule(code=source, options=("-std=c++17", *macros), backend="nvrtc")
        _modules.append(module)
        return _Kernels(*(int(module.get_function(n).kernel.ptr) for n in ("shrink", "expand")))


_modules: "list[cupy.RawModule]" = []  # a module unloads its kernels when it is collected
