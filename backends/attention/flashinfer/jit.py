"""Finds out whether flashinfer and its compiled modules are available.

A module is a shared object. It is prebuilt (flashinfer/data/aot/NAME/NAME.so), or nvcc and ninja
build it at first use and the user's cache keeps it.
"""

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from loraplex.backends.attention.contract import AttentionSpec

build_errors: dict[str, str] = {}
"""Errors of failed builds, by the module's name. A failed build is not tried again."""


def missing_reason(spec: AttentionSpec, kind: str) -> str | None:
    """Returns why a module can neither be loaded nor built, or None."""
    found = jit_spec(spec, kind)
    if found.name in build_errors:
        return f"the kernels {found.name} do not build: {build_errors[found.name]}"
    if found.is_aot:
        return None
    toolkit = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    missing = []
    if shutil.which("nvcc") is None and not (Path(toolkit) / "bin" / "nvcc").exists():
        missing.append("nvcc")
    if shutil.which("ninja") is None:
        missing.append("ninja")
    if not missing:
        return None
    return (
        f"{' and '.join(missing)} must be on PATH to build the kernels {found.name}, "
        f"or they must lie prebuilt at {found.aot_path}"
    )


def library_reason() -> str | None:
    """Returns why the library cannot be used at all, or None."""
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer is not installed (pip install flashinfer-python)"
    try:
        import flashinfer.decode
        import flashinfer.prefill  # noqa: F401
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"flashinfer does not import: {error}"
    return None


def jit_spec(spec: AttentionSpec, kind: str) -> Any:
    """Returns the library's JitSpec of kernels "cuda-cores" (decode), "fa2" or "fa3"."""
    from flashinfer.jit.attention.modules import gen_batch_decode_module, gen_batch_prefill_module

    if kind == "cuda-cores":
        return gen_batch_decode_module(*module_key(spec))
    return gen_batch_prefill_module(kind, *module_key(spec), False)


def module_key(spec: AttentionSpec) -> tuple[Any, ...]:
    """Returns a module's parameters: types of q, cache, output and indices, head sizes, and no
    rotation, window or soft cap."""
    types = (spec.dtype, spec.page_dtype, spec.dtype, torch.int32)
    return (*types, spec.head_dim, spec.head_dim, 0, False, False)
