"""Launches of CUDA kernels through the driver, with arguments that are laid out once.

CuPy's launch cannot ask for programmatic dependent launch. CuPy's and Triton's launches pack and
check all arguments every time.
"""

import ctypes
from collections.abc import Sequence
from functools import cache, partial

import torch

Scalar = ctypes.c_int32 | ctypes.c_int64 | ctypes.c_float

_PROGRAMMATIC_STREAM_SERIALIZATION = 6


@cache
def cuda_driver() -> ctypes.CDLL:
    """Returns libcuda."""
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
    """A kernel and its arguments: pointers first, then 32-bit integers, then the rest.

    The driver copies the arguments at each launch, into a graph too.

    Attributes:
        pointers, integers: may be set between launches.

    Args:
        function: the driver's handle, of the context that is current at each launch.
        pdl: the kernel may start while the previous one still runs.
        rest: arguments after the integers.
        shared_bytes: dynamic shared memory. The function must allow more than 48 KiB.
    """

    def __init__(
        self,
        function: int,
        *,
        num_threads: int,
        pdl: bool,
        pointers: Sequence[int],
        integers: Sequence[int] = (),
        rest: Sequence[Scalar | ctypes.c_void_p] = (),
        shared_bytes: int = 0,
    ) -> None:
        self.pointers = (ctypes.c_void_p * len(pointers))(*pointers)
        self.integers = (ctypes.c_int * len(integers))(*integers)
        self._rest = tuple(rest)
        first_pointer = ctypes.addressof(self.pointers)
        first_integer = ctypes.addressof(self.integers)
        arguments = (ctypes.c_void_p * (len(pointers) + len(integers) + len(rest)))(
            *(first_pointer + 8 * i for i in range(len(pointers))),
            *(first_integer + 4 * i for i in range(len(integers))),
            *(ctypes.addressof(value) for value in self._rest),
        )
        self._attribute = _Attribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        self._config = _Config(
            1, 1, 1, num_threads, 1, 1, shared_bytes, None,
            ctypes.pointer(self._attribute), int(pdl),
        )  # fmt: skip
        self._launch = partial(
            cuda_driver().cuLaunchKernelEx, ctypes.byref(self._config), ctypes.c_void_p(function),
            arguments, None,
        )  # fmt: skip

    def set_scalar(self, index: int, value: int) -> None:
        """Replace one of `rest`, for later launches."""
        self._rest[index].value = value

    def enqueue(self, num_blocks: int, stream: int) -> None:
        """Launch on a raw stream. Raises RuntimeError if the driver refuses."""
        config = self._config
        config.grid_x = num_blocks
        config.stream = stream
        status = self._launch()
        if status:
            raise RuntimeError(f"cuLaunchKernelEx failed with CUDA error {status}")


def current_stream(device_index: int) -> int:
    """Returns the raw handle of torch's current stream."""
    return torch._C._cuda_getCurrentRawStream(device_index)


def parameter_layout(function: int) -> list[tuple[int, int]]:
    """Returns (offset, size) in bytes of each parameter of a kernel, from the driver.

    Raises AttributeError if the driver is older than CUDA 12.4 and has no such call.
    """
    get_info = cuda_driver().cuFuncGetParamInfo
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    layout: list[tuple[int, int]] = []
    while not get_info(
        ctypes.c_void_p(function),
        ctypes.c_size_t(len(layout)),
        ctypes.byref(offset),
        ctypes.byref(size),
    ):
        layout.append((offset.value, size.value))
    return layout
