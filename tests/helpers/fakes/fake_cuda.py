"""A driver that launches nothing, for Triton and for Launch: kernels compile for sm_90, no GPU.

What a kernel takes is read from its PTX, and a launch is read from memory as cuda.h lays it out,
so both are judged by something other than what wrote them.
"""

import ctypes
import re
import struct
import zlib
from dataclasses import dataclass
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager

FORMATS = {"u64": "Q", "u32": "i", "f32": "f"}
INVALID_VALUE = 1


@dataclass(frozen=True)
class Seen:
    """One launch; `arguments` are the values that the kernel would read."""

    name: str
    grid: tuple[int, int, int]
    threads: tuple[int, int, int]
    shared_bytes: int
    stream: int
    is_pdl: bool
    arguments: list[int | float]


def ptx_parameters(ptx: str) -> list[str]:
    """The types of the kernel's parameters: u64, u32, f32."""
    entry = ptx[ptx.index(".entry") :]
    declared = entry[entry.index("(") : entry.index(")")]
    return re.findall(r"\.param \.(\w+)", declared)


class FakeCuda:
    """Stands in for Triton's active driver and for libcuda.

    Attributes:
        launches: through cuLaunchKernelEx.
        ordinary: arguments of launches through Triton's own launcher.
        hidden: parameters that cuFuncGetParamInfo invents.
    """

    def __init__(self) -> None:
        self.launches: list[Seen] = []
        self.ordinary: list[tuple[Any, ...]] = []
        self.hidden = 0
        self.status = 0
        self.utils = self
        self.functions: dict[int, tuple[str, list[str]]] = {}
        self._ptx = ""
        pointer = ctypes.c_void_p
        info = ctypes.CFUNCTYPE(
            ctypes.c_int, pointer, ctypes.c_size_t, ctypes.POINTER(ctypes.c_size_t),
            ctypes.POINTER(ctypes.c_size_t),
        )  # fmt: skip
        launch = ctypes.CFUNCTYPE(ctypes.c_int, pointer, pointer, pointer, pointer)
        self.cuFuncGetParamInfo = info(self._get_param_info)
        self.cuLaunchKernelEx = launch(self._launch)

    # Triton's driver

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 99  # Triton keeps what it compiled by device: apart from that of a real one

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        path = get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx")
        assert path is not None
        with open(path) as file:
            self._ptx = file.read()
        return lambda *args: self.ordinary.append(args)

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple:
        function = zlib.crc32(cubin) + 1
        self.functions[function] = (name, ptx_parameters(self._ptx))
        return None, function, 32, 0, 1024  # no module, so that nothing is unloaded

    # libcuda

    def _get_param_info(self, function: int, index: int, offset: Any, size: Any) -> int:
        kinds = [*self.functions[function][1], *["u64"] * self.hidden]
        if index >= len(kinds):
            return INVALID_VALUE
        end = 0
        for kind in kinds[: index + 1]:
            size[0] = struct.calcsize(FORMATS[kind])
            offset[0] = -(-end // size[0]) * size[0]
            end = offset[0] + size[0]
        return 0

    def _launch(self, config: int, function: int, arguments: int, extra: int | None) -> int:
        assert extra is None
        raw = ctypes.string_at(config, 56)
        grid, threads = struct.unpack_from("3I", raw, 0), struct.unpack_from("3I", raw, 12)
        (shared,), (count,) = struct.unpack_from("I", raw, 24), struct.unpack_from("I", raw, 48)
        stream, attributes = struct.unpack_from("2Q", raw, 32)
        is_pdl = False
        if count:
            attribute = ctypes.string_at(attributes, 72)
            assert count == 1 and struct.unpack_from("i", attribute, 0) == (6,)
            is_pdl = struct.unpack_from("i", attribute, 8) == (1,)
        name, kinds = self.functions[function]
        places = struct.unpack(f"{len(kinds)}Q", ctypes.string_at(arguments, 8 * len(kinds)))
        values = [
            struct.unpack(FORMATS[kind], ctypes.string_at(at, struct.calcsize(FORMATS[kind])))[0]
            for kind, at in zip(kinds, places, strict=True)
        ]
        self.launches.append(Seen(name, grid, threads, shared, stream, is_pdl, values))
        return self.status
