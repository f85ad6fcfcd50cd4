"""The list of backends. Importing this file imports neither torch nor any kernel.

To add a backend, write one file with a class that takes the op's spec and has `probe`, and add one
line below.
"""

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from loraplex.backends.attention.contract import AttentionSpec
    from loraplex.backends.collective.contract import CollectiveSpec
    from loraplex.backends.fused.contract import FusedSpec
    from loraplex.backends.linear.contract import LinearSpec
    from loraplex.backends.lora.contract import LoRASpec

AUTO = "auto"

Spec: TypeAlias = "AttentionSpec | FusedSpec | LinearSpec | LoRASpec | CollectiveSpec"


class BackendError(ValueError):
    """The requested backend does not exist or cannot run here. The text lists those that can."""


class BackendClass(Protocol):
    """A backend's class. Call `probe` before it is made with the op's spec."""

    def __call__(self, spec: Any) -> Any: ...

    def probe(self, spec: Any = None) -> str | None:
        """Returns None when usable for `spec` (None: on this machine at all), else the reason."""
        ...


@dataclass(frozen=True, slots=True)
class Backend:
    """One implementation of one op, imported on first use."""

    op: str
    name: str
    module: str
    class_name: str

    def load(self) -> BackendClass:
        return getattr(importlib.import_module(self.module), self.class_name)

    def probe(self, spec: "Spec | None" = None) -> str | None:
        """Returns None when it can run here (for `spec`, if given), else the reason."""
        try:
            backend_class = self.load()
        except (ImportError, OSError, RuntimeError) as error:
            return f"its library does not load: {error}"
        return backend_class.probe(spec)

    def make(self, spec: "Spec") -> Any:
        """Returns the op. Call `probe` first."""
        return self.load()(spec)


# The fastest of each op comes first: `auto` takes the first one that can run.
_BACKENDS: tuple[Backend, ...] = (
    Backend("lora", "hybrid", "loraplex.backends.lora.hybrid", "HybridLoRA"),
    Backend("lora", "triton", "loraplex.backends.lora.sgmv.triton_sgmv", "TritonSGMV"),
    Backend("lora", "cupy", "loraplex.backends.lora.bgmv.cupy_bgmv", "CupyBGMV"),
    Backend("lora", "torch", "loraplex.backends.lora.torch_bmm", "TorchLoRA"),
    Backend(
        "attention",
        "flashinfer",
        "loraplex.backends.attention.flashinfer.attention",
        "FlashInferAttention",
    ),
    Backend(
        "attention", "xformers", "loraplex.backends.attention.xformers_paged", "XFormersAttention"
    ),
    Backend("attention", "torch", "loraplex.backends.attention.torch_sdpa", "TorchAttention"),
    Backend("fused", "triton", "loraplex.backends.fused.triton_ops", "TritonFused"),
    Backend("fused", "torch", "loraplex.backends.fused.torch_ops", "TorchFused"),
    Backend("linear", "fp8", "loraplex.backends.linear.fp8_linear", "Fp8Linear"),
    Backend("linear", "torch", "loraplex.backends.linear.torch_linear", "TorchLinear"),
    Backend("collective", "symm_mem", "loraplex.backends.collective.symm_mem", "SymmMemCollective"),
    Backend("collective", "nccl", "loraplex.backends.collective.distributed", "NcclCollective"),
    Backend("collective", "gloo", "loraplex.backends.collective.distributed", "GlooCollective"),
)

OPS = tuple(dict.fromkeys(backend.op for backend in _BACKENDS))


def list_backends(op: str | None = None) -> tuple[Backend, ...]:
    """Returns all backends, or those of one op, the preferred one first."""
    return tuple(backend for backend in _BACKENDS if op in (None, backend.op))


def resolve(op: str, name: str = AUTO, spec: "Spec | None" = None) -> Backend:
    """Returns the backend of `op` called `name`, or the best that can run if `name` is "auto".

    Raises:
        BackendError: unknown op or name, or unusable (for `spec`, if given).
    """
    candidates = list_backends(op)
    if not candidates:
        raise BackendError(f"no op {op!r}; there are {', '.join(OPS)}")
    if name != AUTO:
        candidates = tuple(backend for backend in candidates if backend.name == name)
        if not candidates:
            raise BackendError(f"no {op} backend {name!r}; there are: {_describe(op, spec)}")
    for backend in candidates:
        if backend.probe(spec) is None:
            return backend
    if name == AUTO:
        raise BackendError(f"no {op} backend can run here: {_describe(op, spec)}")
    reason = candidates[0].probe(spec)
    raise BackendError(
        f"{op} backend {name!r} cannot run here: {reason}; there are: {_describe(op, spec)}"
    )


def _describe(op: str, spec: "Spec | None") -> str:
    texts = []
    for backend in list_backends(op):
        reason = backend.probe(spec)
        texts.append(f"{backend.name} ({'usable' if reason is None else reason})")
    return "; ".join([f"{AUTO} (the first usable one)", *texts])
