"""Launches of Triton kernels through the driver, for a fraction of the CPU time.

Triton's own launch binds, types and specialises every argument every time. Here Triton compiles
the kernel to the binary that its own launch would use, and arguments that stay are laid out once.

The parameters of a compiled kernel are its arguments in the order of the signature, without
constexprs and without integers of value 1, which Triton makes constants. Two pointers to scratch
memory follow, null if the kernel needs none. This layout and the compiled kernel's fields are
private to Triton (3.6 to 3.9 were read): pyproject.toml bounds its version. Before a kernel's first
launch the driver's view of its parameters is compared.
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
"""Bytes. Triton specialises on pointers that are multiples of it."""
_SCALARS: dict[str, Callable[[Any], Scalar]] = {
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "fp32": ctypes.c_float,
}

logger = logging.getLogger(__name__)


class UnknownLayout(Exception):
    """A kernel cannot be launched through the driver. The text says why."""


class TritonLaunch:
    """A Triton kernel of which only the first tensors, and the first scalar, change between calls.

    The tensors of all calls have the dtypes of the first call's and lie on its device, whose
    context is current. Their contents and addresses may change. If the driver cannot launch the
    kernel (Triton's interpreter, a tensor that does not start at 16 bytes, an unknown parameter
    layout), Triton's own launch does. Triton's launch hooks see only such launches.

    Args:
        kernel: made by triton.jit.
        scalars: the arguments after the tensors, in order. If calls set the first one, the kernel
            must not specialise on it (`do_not_specialize`).
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
        self._options = options
        self._launch: Launch | None = None
        self._may_prepare = isinstance(kernel, triton.JITFunction)
        self._device_index = -1
        self._compiled: Any = None  # unloads the kernel when it is collected

    def __call__(
        self, num_blocks: int, *tensors: torch.Tensor, first_scalar: int | None = None
    ) -> None:
        """Enqueue on torch's current stream. Does nothing for 0 blocks.

        Args:
            first_scalar: replaces the first of `scalars`, in this call and later ones.
        """
        if not num_blocks:
            return
        launch = self._launch or self._prepare(tensors)
        if first_scalar is not None:
            self._scalars = (first_scalar, *self._scalars[1:])
            if launch is not None:
                launch.set_scalar(0, first_scalar)
        if launch is None or not _set_pointers(launch, tensors):
            rest = (*self._kept, *self._scalars)
            self._kernel[(num_blocks,)](*tensors, *rest, **self._options)
        else:
            launch.enqueue(num_blocks, current_stream(self._device_index))

    def _prepare(self, tensors: tuple[torch.Tensor, ...]) -> Launch | None:
        """Compile for aligned tensors and lay out the arguments. Returns None if it cannot."""
        if not self._may_prepare:
            return None
        everything = (*tensors, *self._kept)
        if any(tensor.data_ptr() % ALIGNMENT for tensor in everything):
            return None
        self._may_prepare = False
        rest = (*self._kept, *self._scalars)
        self._compiled = self._kernel.warmup(*tensors, *rest, grid=(1,), **self._options)
        try:
            self._launch = lay_out(self._compiled, self._scalars)
            _set_pointers(self._launch, everything)
        except UnknownLayout as error:
            _warn(self._kernel.fn.__name__, str(error))
        self._device_index = tensors[0].get_device()
        return self._launch


def _set_pointers(launch: Launch, tensors: tuple[torch.Tensor, ...]) -> bool:
    """Set the first pointers. Returns False if a tensor is not aligned."""
    pointers = launch.pointers
    for i, tensor in enumerate(tensors):
        address = tensor.data_ptr()
        if address % ALIGNMENT:
            return False
        pointers[i] = address
    return True


def lay_out(compiled: Any, scalars: Sequence[int | float]) -> Launch:
    """Returns the launch of a compiled kernel, with null tensors.

    Raises UnknownLayout, naming the cause, if the kernel needs what a Launch does not offer.
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
    """Returns the number of tensors and the arguments after them, without Triton's constants.

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
