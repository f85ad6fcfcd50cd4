"""Launches of CUDA kernels through the driver, their arguments laid out once.

CuPy's own launch cannot ask for programmatic dependent launch, and packs its arguments every time.
"""

import ctypes
from collections.abc import Sequence
from functools import cache

_PROGRAMMATIC_STREAM_SERIALIZATION = 6


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


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


class Launch:
    """One kernel with its arguments: pointers first, then 32-bit integers.

    Attributes:
        pointers, integers: the arguments, which may be set between launches.

    Args:
        function: the driver's handle.
        pdl: may start while the kernel before it still runs.
    """

    def __init__(
        self,
        function: int,
        *,
        num_threads: int,
        pdl: bool,
        pointers: Sequence[int],
        integers: Sequence[int],
    ) -> None:
        self.pointers = (ctypes.c_void_p * len(pointers))(*pointers)
        self.integers = (ctypes.c_int * len(integers))(*integers)
        first_pointer = ctypes.addressof(self.pointers)
        first_integer = ctypes.addressof(self.integers)
        self._arguments = (ctypes.c_void_p * (len(pointers) + len(integers)))(
            *(first_pointer + 8 * i for i in range(len(pointers))),
            *(first_integer + 4 * i for i in range(len(integers))),
        )
        self._attribute = _Attribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        self._config = _Config(
            1, 1, 1, num_threads, 1, 1, 0, None, ctypes.pointer(self._attribute), int(pdl)
        )
        self._config_address = ctypes.byref(self._config)
        self._function = ctypes.c_void_p(function)
        self._launch = _driver().cuLaunchKernelEx

    def __call__(self, num_blocks: int, stream: int) -> None:
        """Enqueue on a raw stream. Raises RuntimeError if the driver refuses."""
        self._config.grid_x = num_blocks
        self._config.stream = stream
        status = self._launch(self._config_address, self._function, self._arguments, None)
        if status:
            raise RuntimeError(f"cuLaunchKernelEx failed with CUDA error {status}")
