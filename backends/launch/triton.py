"""Launches of Triton kernels through the driver, for a fraction of the CPU time.

Triton's own launch binds, types and specialises every argument every time. Here Triton compiles
the kernel (the very binary that its own launch takes), and arguments that stay are laid out once.

The parameters of a compiled kernel are the arguments that are neither constexpr nor, as an integer
of value 1, made a constant by Triton, in the order of the signature; behind them come two pointers
to scratch memory, null where the kernel needs none (Triton 3.6 to 3.9). The driver is asked
whether it sees the same before a kernel is first launched so.
"""

import ctypes
import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import triton

from loraplex.backends.launch.cuda import Launch, Scalar, current_stream, parameter_layout

NUM_SCRATCH_POINTERS = 2
ALIGNMENT = 16
"""Bytes; what Triton specialises pointers on."""
_SCALARS: dict[str, Callable[[Any], Scalar]] = {
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "fp32": ctypes.c_float,
}

logger = logging.getLogger(__name__)


class UnknownLayout(Exception):
    """Why a kernel cannot be launched through the driver."""


class TritonLaunch:
    """A Triton kernel all of whose arguments stay, but for the first tensors.

    The tensors of all calls have the dtypes of the first call's and lie on its device, whose
    context is current; their contents and addresses may change. What the driver cannot launch
    (Triton's interpreter, a tensor that does not start at 16 bytes, a layout that does not add up)
    goes through Triton's own launch. Triton's launch hooks see only that.

    Args:
        kernel: made by triton.jit.
        scalars: the arguments after the tensors, in order.
        kept: tensors that follow those of each call; their contents may change.
        options: the constexprs, and Triton's options (num_warps and so on).
    """

    def __init__(
        self,
        kernel: Any,
        scalars: Sequence[int | float],
        kept: Sequence[torch.Tensor] = (),
        **options: Any,
    ) -> None:
        self._kernel = kernel
        self._scalars = tuple(scalars)
        self._kept = tuple(kept)
        self._rest = (*kept, *scalars)
        self._options = options
        self._launch: Launch | None = None
        self._may_prepare = isinstance(kernel, triton.JITFunction)
        self._device_index = -1
        self._compiled: Any = None  # unloads the kernel when it is collected

    def __call__(self, num_blocks: int, *tensors: torch.Tensor) -> None:
        """Enqueue on torch's current stream; no blocks: nothing."""
        if not num_blocks:
            return
        launch = self._launch or self._prepare(tensors)
        if launch is None or not _set_pointers(launch, tensors):
            self._kernel[(num_blocks,)](*tensors, *self._rest, **self._options)
        else:
            launch.enqueue(num_blocks, current_stream(self._device_index))

    def _prepare(self, tensors: tuple[torch.Tensor, ...]) -> Launch | None:
        """Compile for aligned tensors and lay out the arguments; None where that cannot be."""
        if not self._may_prepare:
            return None
        everything = (*tensors, *self._kept)
        if any(tensor.data_ptr() % ALIGNMENT for tensor in everything):
            return None
        self._may_prepare = False
        self._compiled = self._kernel.warmup(*tensors, *self._rest, grid=(1,), **self._options)
        try:
            self._launch = lay_out(self._compiled, self._scalars)
            _set_pointers(self._launch, everything)
        except UnknownLayout as error:
            _warn(self._kernel.fn.__name__, str(error))
        self._device_index = tensors[0].get_device()
        return self._launch


def _set_pointers(launch: Launch, tensors: tuple[torch.Tensor, ...]) -> bool:
    """The first of them; False if one is not aligned."""
    pointers = launch.pointers
    for i, tensor in enumerate(tensors):
        address = tensor.data_ptr()
        if address % ALIGNMENT:
            return False
        pointers[i] = address
    return True


def lay_out(compiled: Any, scalars: Sequence[int | float]) -> Launch:
    """The launch of a compiled kernel, its tensors null.

    Raises UnknownLayout, naming the cause, if the kernel needs what a Launch does not give.
    """
    metadata = compiled.metadata
    if metadata.num_ctas != 1 or metadata.launch_cooperative_grid:
        raise UnknownLayout("it runs as a cluster or a cooperative grid")
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise UnknownLayout("it needs scratch memory of Triton's")
    num_pointers, rest = arguments_of(compiled, scalars)
    compiled._init_handles()
    _check_layout(compiled.function, [8] * num_pointers + [ctypes.sizeof(value) for value in rest])
    return Launch(
        compiled.function,
        num_threads=metadata.num_warps * metadata.warp_size,
        pdl=bool(metadata.launch_pdl),
        pointers=(0,) * num_pointers,
        rest=rest,
        shared_bytes=metadata.shared,
    )


def arguments_of(
    compiled: Any, scalars: Sequence[int | float]
) -> tuple[int, list[Scalar | ctypes.c_void_p]]:
    """The number of tensors, and the arguments that follow them, without Triton's constants.

    Raises UnknownLayout for types other than pointers, then int32, int64 and fp32.
    """
    types = list(compiled.src.signature.values())
    num_pointers = sum(kind.startswith("*") for kind in types)
    rest: list[Scalar | ctypes.c_void_p] = []
    for kind, value in zip(types[num_pointers:], scalars, strict=False):  # constexprs follow
        if kind == "constexpr":
            continue
        if kind not in _SCALARS:
            raise UnknownLayout(f"an argument of type {kind} follows its tensors")
        rest.append(_SCALARS[kind](value))
    rest.extend(ctypes.c_void_p() for _ in range(NUM_SCRATCH_POINTERS))
    return num_pointers, rest


def _check_layout(function: int, sizes: list[int]) -> None:
    """Raises UnknownLayout if the driver sees parameters other than these."""
    try:
        layout = parameter_layout(function)
    except AttributeError:
        raise UnknownLayout("the driver is older than CUDA 12.4") from None
    expected, end = [], 0
    for size in sizes:
        offset = -(-end // size) * size
        expected.append((offset, size))
        end = offset + size
    if layout != expected:
        raise UnknownLayout(f"its parameters (offset, size) are {layout}, not {expected}")


@cache
def _warn(name: str, reason: str) -> None:
    logger.warning(
        "kernel %s is launched through Triton's slower launcher: %s. If this follows an update of "
        "Triton, report it.",
        name,
        reason,
    )
