"""The BGMV backend on the CPU: its CUDA source compiled by g++, its launches run by an emulator."""

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
NUM_PROCESSORS = 3
_libraries: "list[_Library]" = []
"""A kernel's handle is twice its library's place here, plus 1 for expand."""


class _Library:
    """The two kernels for one set of macros. g++ takes a second or more, so it runs at the first
    launch: a test compiles only the kinds and groups that it runs."""

    def __init__(self, macros: tuple[str, ...]) -> None:
        self._macros = macros

    @cached_property
    def functions(self) -> list[Any]:
        source = Path(str(resources.files("loraplex.backends.lora.bgmv").joinpath("bgmv.cu")))
        with TemporaryDirectory() as folder:
            library = f"{folder}/bgmv.so"
            subprocess.run(
                ["g++", "-std=c++17", "-O1", "-fno-strict-aliasing", "-w", "-shared", "-fPIC",
                 "-DEMULATED", f'-DBGMV="{source}"', *self._macros, "-o", library,
                 str(HERE / "bgmv_emulated.cc")],
                check=True,
            )  # fmt: skip
            loaded = ctypes.CDLL(library)
        functions = [loaded.run_shrink, loaded.run_expand]
        for function in functions:
            function.argtypes = [ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p]
            function.restype = ctypes.c_char_p
        return functions


class EmulatedLaunch:
    """Has the interface of backends.launch.cuda.Launch."""

    def __init__(
        self,
        function: int,
        *,
        num_threads: int,
        pdl: bool,
        pointers: Sequence[int],
        integers: Sequence[int] = (),
        rest: Sequence[Any] = (),
    ) -> None:
        self.pointers = (ctypes.c_void_p * len(pointers))(*pointers)
        self.integers = (ctypes.c_int * len(integers))(*integers)
        self._rest = rest
        self._function, self._num_threads = function, num_threads

    def enqueue(self, num_blocks: int, stream: int) -> None:
        places = [ctypes.addressof(self.pointers) + 8 * i for i in range(len(self.pointers))]
        places += [ctypes.addressof(self.integers) + 4 * i for i in range(len(self.integers))]
        places += [ctypes.addressof(value) for value in self._rest]
        arguments = (ctypes.c_void_p * len(places))(*places)
        kernel = _libraries[self._function // 2].functions[self._function % 2]
        fault = kernel(num_blocks, self._num_threads, arguments)
        if fault:
            raise RuntimeError(f"CUDA kernel: {fault.decode()}")


@cache
def compile_kernels(macros: tuple[str, ...], device_index: int = 0) -> Any:
    """Stands in for the compiler of cupy_bgmv."""
    from loraplex.backends.lora.bgmv import cupy_bgmv

    _libraries.append(_Library(macros))
    handle = 2 * (len(_libraries) - 1)
    return cupy_bgmv.Kernels(handle, handle + 1)


def emulate_bgmv(monkeypatch: pytest.MonkeyPatch, num_processors: int = NUM_PROCESSORS) -> Any:
    """Returns CupyBGMV, whose instances then run on CPU tensors."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    if "cupy" not in sys.modules:
        monkeypatch.setitem(sys.modules, "cupy", ModuleType("cupy"))
    from loraplex.backends.lora.bgmv import cupy_bgmv

    properties = SimpleNamespace(multi_processor_count=num_processors, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(cupy_bgmv, "compile_kernels", compile_kernels)
    monkeypatch.setattr(cupy_bgmv, "Launch", EmulatedLaunch)
    monkeypatch.setattr(cupy_bgmv, "current_stream", lambda index: 0)
    return cupy_bgmv.CupyBGMV
