"""Backend ``cupy`` of op ``lora``: BGMV raw kernels, bound by the bytes of the adapters' weights.

CuPy compiles the CUDA source through NVRTC when the backend is made, two kernels for each kind
of batch and group of projections, and caches the binaries. Kernels run on torch's current stream.
Input and output sizes must be multiples of 8 (16-byte vectors).
"""

from dataclasses import dataclass
from functools import cache
from importlib import resources

import cupy
import torch

from loraplex.backends.fp8 import E4M3, why_not_e4m3
from loraplex.backends.launch.buffers import BufferPool
from loraplex.backends.launch.cuda import Launch, current_stream
from loraplex.backends.launch.upload import Uploader
from loraplex.backends.lora.bgmv.plan import (
    EXPAND_THREADS,
    GRAPH_ROWS,
    ITEM_RANKS,
    KINDS,
    MAX_SPLITS,
    SHRINK_WARPS,
    BGMVPlan,
    Kind,
    PlanLayout,
    choose_kind,
)
from loraplex.backends.lora.contract import (
    LoRABatch,
    LoRAGroup,
    LoRASpec,
    LoRATable,
    check_graph_batch,
)


@dataclass(frozen=True, slots=True)
class Kernels:
    """The driver's handles of one group's kernels."""

    shrink: int
    expand: int


X_OR_Y, PLAN = 0, 3
"""Pointers of a launch that each call sets."""
X_OR_Y_STRIDE, CAPACITY = 0, 4
"""Integers of a launch that each call sets."""


@dataclass(frozen=True, slots=True)
class _Launches:
    """The launches of one layer, group and kind.

    Shrink has `shrink_blocks` blocks, or one for each row and module if these are more. Expand has
    one for each panel of columns and `rows_per_tile` rows, at most `expand_blocks`.
    """

    shrink: Launch
    expand: Launch
    num_modules: int
    num_panels: int
    rows_per_tile: int
    shrink_blocks: int
    expand_blocks: int


class CupyBGMV:
    """Attributes:
    scratch: float32, x A between shrink and expand.
    """

    name = "cupy"
    graph_kinds: tuple[str, ...] = tuple(KINDS)
    max_graph_rows = GRAPH_ROWS

    @staticmethod
    def probe(spec: LoRASpec | None = None) -> str | None:
        """Returns None when usable, else the reason."""
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
        if odd:
            return f"it takes multiples of 8 features, not {odd}"
        return why_not_e4m3(spec.device) if spec.weight_dtype is E4M3 else None

    def __init__(self, spec: LoRASpec) -> None:
        properties = torch.cuda.get_device_properties(spec.device)
        self._spec = spec
        self._num_processors = properties.multi_processor_count
        self._pdl = properties.major >= 9
        self._kernels = {(k, g): self._compile(k, g) for k in KINDS for g in spec.groups}
        self._capacity = -(-max(spec.max_num_tokens, GRAPH_ROWS) // 4) * 4  # 16-byte items follow
        self._layout = PlanLayout(
            spec.groups, spec.max_rank, self._capacity, self._num_processors, spec.row_align
        )  # fmt: skip
        self._v_module_stride = self._layout.items_per_row * ITEM_RANKS
        self._v_row_stride = 3 * self._v_module_stride
        num_floats = self._capacity * self._v_row_stride
        self.scratch = torch.empty(num_floats, dtype=torch.float32, device=spec.device)
        self._buffers = BufferPool(spec.device, self._layout.num_bytes(self._capacity))
        self._static = {
            kind: torch.zeros(
                self._layout.num_bytes(GRAPH_ROWS), dtype=torch.uint8, device=spec.device
            )
            for kind in KINDS
        }
        self._uploader = Uploader(spec.device)
        self._device_index = self.scratch.get_device()
        self._launches: dict[tuple[str, int, int], _Launches] = {}
        self._table: LoRATable | None = None
        self._pool: torch.Tensor | None = None

    def kind_of(self, *, table: LoRATable, batch: LoRABatch) -> str:
        return choose_kind(batch)

    def plan(self, *, table: LoRATable, batch: LoRABatch) -> BGMVPlan:
        kind = self.kind_of(table=table, batch=batch)
        capacity = GRAPH_ROWS if batch.num_tokens <= GRAPH_ROWS else self._capacity
        arrays = self._layout.arrays(KINDS[kind], capacity, table, batch)
        buffer = self._buffers.take()
        self._uploader.upload(arrays, out=buffer.tensor)
        return BGMVPlan(kind, table, buffer.tensor.data_ptr(), capacity, buffer)

    def plan_graph(self, *, table: LoRATable, batch: LoRABatch, kind: str) -> BGMVPlan:
        check_graph_batch(self, batch, kind)
        static = self._static[kind]
        arrays = self._layout.arrays(KINDS[kind], GRAPH_ROWS, table, batch)
        self._uploader.upload(arrays, out=static)
        return BGMVPlan(kind, table, static.data_ptr(), GRAPH_ROWS, None)

    def shrink(
        self, plan: BGMVPlan, *, x: torch.Tensor, pool: torch.Tensor, layer: int, group: LoRAGroup
    ) -> None:
        launches = self._launches_of(plan, layer, group, pool)
        launch = launches.shrink
        launch.pointers[X_OR_Y], launch.pointers[PLAN] = x.data_ptr(), plan.address
        launch.integers[X_OR_Y_STRIDE], launch.integers[CAPACITY] = x.stride()[0], plan.capacity
        num_blocks = max(x.shape[0] * launches.num_modules, launches.shrink_blocks)
        launch.enqueue(num_blocks, current_stream(self._device_index))

    def expand(
        self, plan: BGMVPlan, *, y: torch.Tensor, pool: torch.Tensor, layer: int, group: LoRAGroup
    ) -> None:
        launches = self._launches_of(plan, layer, group, pool)
        launch = launches.expand
        launch.pointers[X_OR_Y], launch.pointers[PLAN] = y.data_ptr(), plan.address
        launch.integers[X_OR_Y_STRIDE], launch.integers[CAPACITY] = y.stride()[0], plan.capacity
        num_tiles = -(-y.shape[0] // launches.rows_per_tile)
        num_blocks = min(num_tiles * launches.num_panels, launches.expand_blocks)
        launch.enqueue(num_blocks, current_stream(self._device_index))

    def _launches_of(
        self, plan: BGMVPlan, layer: int, group: LoRAGroup, pool: torch.Tensor
    ) -> _Launches:
        table = plan.table
        if table is not self._table or pool is not self._pool:
            self._launches.clear()  # they keep the addresses and strides of one table and one pool
            self._table, self._pool = table, pool
        key = (plan.kind, layer, group.modules[0])
        launches = self._launches.get(key)
        if launches is None:
            launches = self._prepare(plan.kind, layer, group, table, pool)
            self._launches[key] = launches
        return launches

    def _prepare(
        self, kind_name: str, layer: int, group: LoRAGroup, table: LoRATable, pool: torch.Tensor
    ) -> _Launches:
        kind, kernels = KINDS[kind_name], self._kernels[kind_name, group]
        first = group.modules[0]
        common = (
            pool[layer].data_ptr(), 0, table.page_table.data_ptr(),
            table.rank[layer, first].data_ptr(),
        )  # fmt: skip
        integers = (
            0, table.page_table.stride(0), table.rank.stride(2), table.rank.stride(1), 0,
            self._v_row_stride, self._v_module_stride,
        )  # fmt: skip
        shrink = Launch(
            kernels.shrink, num_threads=SHRINK_WARPS * 32, pdl=self._pdl,
            pointers=(0, self.scratch.data_ptr(), *common, table.a_start[layer, first].data_ptr()),
            integers=integers,
        )  # fmt: skip
        expand = Launch(
            kernels.expand, num_threads=EXPAND_THREADS, pdl=self._pdl,
            pointers=(0, self.scratch.data_ptr(), *common, table.b_start[layer, first].data_ptr(),
                      table.scale[layer, first].data_ptr()),
            integers=integers,
        )  # fmt: skip
        return _Launches(
            shrink, expand, num_modules=len(group.modules),
            num_panels=sum(-(-out // kind.columns) for out in group.out_features),
            rows_per_tile=kind.rows_per_tile,
            shrink_blocks=self._num_processors * kind.shrink_blocks,
            expand_blocks=self._num_processors * kind.expand_blocks,
        )  # fmt: skip

    def _compile(self, kind: str, group: LoRAGroup) -> Kernels:
        macros = _make_macros(self._spec, KINDS[kind], group, self._pdl)
        return compile_kernels(macros, self._spec.device.index or 0)


def _make_macros(spec: LoRASpec, kind: Kind, group: LoRAGroup, pdl: bool) -> tuple[str, ...]:
    """Returns the compiler options of bgmv.cu for one group."""
    outs, starts = (*group.out_features, 0, 0), (*group.out_starts, 0, 0)
    values = {
        "BF16": int(spec.dtype == torch.bfloat16), "PDL": int(pdl),
        "E4M3": int(spec.weight_dtype is E4M3), "UNIT": spec.row_align,
        "PAGE": spec.page_elems * spec.packing,
        "NUM_MODULES": len(group.modules), "K": group.in_features,
        "K_ROW": spec.row_stride(group.in_features), "GROUP": spec.groups.index(group),
        "NUM_GROUPS": len(spec.groups),
        "MAX_SPLITS": MAX_SPLITS, "MAX_RANK": spec.max_rank,
        "NT": kind.item_rows // 8, "WARPS": SHRINK_WARPS,
        "OUT_0": outs[0], "OUT_1": outs[1], "OUT_2": outs[2], "START_1": starts[1],
        "START_2": starts[2], "ROWS": kind.tile_rows, "THREADS": EXPAND_THREADS,
    }  # fmt: skip
    return tuple(f"-D{name}={value}" for name, value in values.items())


@cache
def compile_kernels(macros: tuple[str, ...], device_index: int) -> Kernels:
    """Compile bgmv.cu with these options, or load the binary from CuPy's cache."""
    source = resources.files("loraplex.backends.lora.bgmv").joinpath("bgmv.cu").read_text()
    with cupy.cuda.Device(device_index):
        module = cupy.RawModule(code=source, options=("-std=c++17", *macros), backend="nvrtc")
        _modules.append(module)
        return Kernels(*(int(module.get_function(n).kernel.ptr) for n in ("shrink", "expand")))


_modules: "list[cupy.RawModule]" = []  # a module unloads its kernels when it is collected
