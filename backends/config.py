"""Options of the backends."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """The implementation of each op. ``auto`` takes the best that can run here."""

    lora_backend: str = field(
        default="auto", metadata={"help": "kernels of the LoRA op (`loraplex backends` lists them)"}
    )
    attention_backend: str = field(
        default="auto",
        metadata={"help": "kernels of paged attention (`loraplex backends` lists them)"},
    )
    fused_backend: str = field(
        default="auto",
        metadata={"help": "kernels of norms, RoPE, SiLU and sampling (see `loraplex backends`)"},
    )
    linear_backend: str = field(
        default="auto",
        metadata={"help": "kernels of the base model's projections (see `loraplex backends`)"},
    )
    collective_backend: str = field(
        default="auto",
        metadata={
            "help": "sums over the GPUs of tensor parallelism (`loraplex backends` lists them)"
        },
    )
