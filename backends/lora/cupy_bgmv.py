"""Backend ``cupy`` of op ``lora``: BGMV raw kernels for steps with few rows an adapter (decode).

CuPy compiles the CUDA source through NVRTC and caches the binary; launches go to torch's current
stream through the driver, so that programmatic dependent launch can be asked for and CUDA graphs
capture them. Input and output sizes must be multiples of 8 (16-byte vectors).
"""

import ctypes
from functools import cache
from importlib import resources

import cupy
import numpy as np
import torch

from loraplex.backends.lora.contract import LoRABatch, LoRAGroup, LoRASpec, LoRATable, row_stride
from loraplex.backends.lora.tiles import largest_ranks, make_tiles, split_ranks

MAX_SPLITS = 16
SHRINK_WARPS = 8
EXPAND_THREADS = 128
MAX_EXPAND_ROWS = 4
MAX_ROW_TILES = 2


class CupyBGMV:
    name = "cupy"

    @staticmethod
    def probe(spec: LoRASpec | None = None) -> str | None:
        """None when usable, else the reason."""
        if not torch.cuda.is_available():
            return "it needs a CUDA device"
        if torch.cuda.get_device_capability()[0] < 8:
            return "it needs compute capability 8.0 or later"
        if spec is not None and spec.device.type != "cuda":
            return f"it needs a CUDA device, not {spec.device.type}"
        if spec is not None and spec.dtype not in (torch.float16, torch.bfloat16):
            return f"it takes float16 or bfloat16, not {spec.dtype}"
        return None

    def __init__(self, spec: LoRASpec) -> None:
        self._spec = spec
        properties = torch.cuda.get_device_properties(spec.device)
        self._num_programs = 4 * properties.multi_processor_count
        self._pdl = properties.major >= 9
        self._launcher = _Launcher(self._pdl)
        self._v_row_stride = 3 * spec.max_rank
        self._v = torch.empty(
            max(spec.max_num_tokens, 512) * self._v_row_stride,
            dtype=torch.float32,
            device=spec.device,
        )
        max_items = spec.max_num_tokens * -(-spec.max_rank // 16)
        self._tiles = torch.empty((spec.max_num_tokens, 4), dtype=torch.int32, device=spec.device)
        self._items = torch.empty((max_items, 4), dtype=torch.int32, device=spec.device)
        self._num_tiles = self._num_items = 0
        self._row_tiles = self._expand_rows = 1

    def plan(self, *, table: LoRATable, batch: LoRABatch) -> None:
        if batch.is_empty:
            return
        starts = np.asarray(batch.segment_starts, dtype=np.int32)
        slots = np.asarray(batch.segment_slots, dtype=np.int32)
        longest = int(np.diff(starts).max())
        self._row_tiles = min(MAX_ROW_TILES, _power_of_two(-(-longest // 8)))
        self._expand_rows = min(MAX_EXPAND_ROWS, _power_of_two(longest))
        slot_ranks = largest_ranks(table.host_rank.numpy(), slots)
        items = split_ranks(make_tiles(starts, slots, 8 * self._row_tiles), slot_ranks, 16)
        tiles = make_tiles(starts, slots, self._expand_rows)
        self._num_tiles, self._num_items = len(tiles), len(items)
        self._tiles[: len(tiles)].copy_(torch.from_numpy(tiles), non_blocking=True)
        self._items[: len(items)].copy_(torch.from_numpy(items), non_blocking=True)

    def apply(
        self,
        *,
        y: torch.Tensor,
        x: torch.Tensor,
        pool: torch.Tensor,
        layer: int,
        group: LoRAGroup,
        table: LoRATable,
        batch: LoRABatch,
    ) -> None:
        if batch.is_empty:
            return
        first, num_modules = group.modules[0], len(group.modules)
        num_rows, page_elems = batch.segment_starts[-1], pool.shape[2]
        splits, units_per_split = self._split_k(group.in_features, num_modules, num_rows)
        rank = table.rank[layer, first].data_ptr()
        order, pages = batch.token_order.data_ptr(), table.page_table.data_ptr()
        strides = (
            table.page_table.stride(0), table.rank.shape[2],
            num_rows * self._v_row_stride, self._v_row_stride, self._spec.max_rank,
        )  # fmt: skip
        stream = torch.cuda.current_stream(y.device).cuda_stream
        weights = pool[layer].data_ptr()
        common = (
            f"-DBF16={int(y.dtype == torch.bfloat16)}", f"-DPAGE={page_elems}",
            f"-DNUM_MODULES={num_modules}", f"-DPDL={int(self._pdl)}",
        )  # fmt: skip
        shrink = _compile(
            "shrink", (*common, *_shrink_macros(group.in_features, self._row_tiles)), y.device.index
        )
        self._launcher.launch(
            shrink, (self._num_items * num_modules, splits), SHRINK_WARPS * 32, stream,
            (x.data_ptr(), self._v.data_ptr(), weights, self._items.data_ptr(), order, pages,
             rank, table.a_start[layer, first].data_ptr()),
            (x.stride(0), *strides, units_per_split),
        )  # fmt: skip
        expand = _compile(
            "expand", (*common, *_expand_macros(group, self._expand_rows, splits)), y.device.index
        )
        num_blocks = sum(-(-out // (EXPAND_THREADS * 8)) for out in group.out_features)
        self._launcher.launch(
            expand, (num_blocks, self._num_tiles), EXPAND_THREADS, stream,
            (y.data_ptr(), self._v.data_ptr(), weights, self._tiles.data_ptr(), order, pages,
             rank, table.b_start[layer, first].data_ptr(), table.scale[layer, first].data_ptr()),
            (y.stride(0), *strides),
        )  # fmt: skip

    def _split_k(self, in_features: int, num_modules: int, num_rows: int) -> tuple[int, int]:
        """The number of splits, and the units of 64 input features of each.

        Powers of two, since each number of splits is a kernel to compile.
        """
        units = -(-in_features // 64)
        wanted = self._num_programs // (self._num_items * num_modules)
        room = self._v.numel() // (num_rows * self._v_row_stride)
        most = max(1, min(wanted, room, MAX_SPLITS, units // SHRINK_WARPS))
        splits = 1 << (most.bit_length() - 1)
        per_split = -(-units // splits)
        return -(-units // per_split), per_split


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()


def _shrink_macros(in_features: int, row_tiles: int) -> tuple[str, ...]:
    return (
        f"-DK={in_features}", f"-DK_ROW={row_stride(in_features)}", f"-DNT={row_tiles}",
        f"-DWARPS={SHRINK_WARPS}",
    )  # fmt: skip


def _expand_macros(group: LoRAGroup, rows: int, splits: int) -> tuple[str, ...]:
    outs, starts = (*group.out_features, 0, 0), (*group.out_starts, 0, 0)
    return (
        *(f"-DOUT_{i}={outs[i]}" for i in range(3)), f"-DSTART_1={starts[1]}",
        f"-DSTART_2={starts[2]}", f"-DROWS={rows}", f"-DTHREADS={EXPAND_THREADS}",
        f"-DSPLITS={splits}",
    )  # fmt: skip


@cache
def _compile(name: str, macros: tuple[str, ...], device_index: int) -> int:
    """The driver's handle of a kernel. CuPy keeps the binary in its cache on disk."""
    source = resources.files("loraplex.backends.lora.kernels").joinpath("bgmv.cu").read_text()
    with cupy.cuda.Device(device_index):
        module = cupy.RawModule(code=source, options=("-std=c++17", *macros), backend="nvrtc")
        _modules.append(module)
        return int(module.get_function(name).kernel.ptr)


_modules: list[cupy.RawModule] = []  # a module unloads its kernels when it is collected


class _Attribute(ctypes.Structure):
    _fields_ = [
        ("id", ctypes.c_int),
        ("padding", ctypes.c_char * 4),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    ]


class _Config(ctypes.Structure):
    _fields_ = [
        *((f"grid_{axis}", ctypes.c_uint) for axis in "xyz"),
        *((f"block_{axis}", ctypes.c_uint) for axis in "xyz"),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    ]


class _Launcher:
    """cuLaunchKernelEx: CuPy's own launch cannot ask for programmatic dependent launch."""

    _PROGRAMMATIC_STREAM_SERIALIZATION = 6

    def __init__(self, pdl: bool) -> None:
        self._launch = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
        self._attribute = _Attribute(id=self._PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        self._num_attributes = int(pdl)

    def launch(
        self,
        kernel: int,
        grid: tuple[int, int],
        num_threads: int,
        stream: int,
        pointers: tuple[int, ...],
        integers: tuple[int, ...],
    ) -> None:
        """Launch with the pointers first, then 32-bit integers, as all kernels here take them."""
        config = _Config(
            *grid, 1, num_threads, 1, 1, 0, stream,
            ctypes.pointer(self._attribute), self._num_attributes,
        )  # fmt: skip
        values = [*map(ctypes.c_void_p, pointers), *map(ctypes.c_int, integers)]
        arguments = (ctypes.c_void_p * len(values))(
            *(ctypes.cast(ctypes.byref(value), ctypes.c_void_p) for value in values)
        )
        status = self._launch(ctypes.byref(config), ctypes.c_void_p(kernel), arguments, None)
        if status:
            raise RuntimeError(f"cuLaunchKernelEx failed with CUDA error {status}")
