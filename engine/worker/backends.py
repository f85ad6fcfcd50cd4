"""Chooses and makes the backends of one worker, for its model's sizes."""

from dataclasses import dataclass

import torch

from loraplex.backends.attention.contract import AttentionOp, AttentionSpec
from loraplex.backends.fused.contract import FusedOps, FusedSpec
from loraplex.backends.lora.contract import LoRAOp, LoRASpec
from loraplex.backends.registry import BackendError, resolve
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError
from loraplex.engine.model.decoder import local_module_shapes, projection_groups
from loraplex.engine.model.spec import ModelSpec
from loraplex.memory.device.pool import PageShape


@dataclass(frozen=True, slots=True)
class WorkerBackends:
    """One backend for each op. Their `name` is the registry's."""

    lora: LoRAOp
    attention: AttentionOp
    fused: FusedOps


def make_backends(
    config: EngineConfig,
    spec: ModelSpec,
    shape: PageShape,
    *,
    max_model_len: int,
    device: torch.device,
) -> WorkerBackends:
    """Make the configured backends, or the best that can run here.

    Raises:
        ConfigError: a configured backend is unknown or cannot run here.
    """
    scheduler, backend = config.scheduler, config.backend
    lora_spec = LoRASpec(
        max_num_tokens=scheduler.max_num_batched_tokens,
        max_rank=config.memory.max_lora_rank,
        dtype=shape.dtype,
        device=device,
        page_elems=shape.page_elems,
        groups=projection_groups(local_module_shapes(spec, tp_size=1)),
    )
    attention_spec = AttentionSpec(
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        block_tokens=shape.block_tokens,
        scale=spec.head_dim**-0.5,
        dtype=shape.dtype,
        device=device,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_tokens=scheduler.max_num_batched_tokens,
        max_pages=-(-(max_model_len + 1) // shape.block_tokens),
    )
    fused_spec = FusedSpec(dtype=shape.dtype, device=device, head_dim=spec.head_dim)
    try:
        return WorkerBackends(
            lora=resolve("lora", backend.lora_backend, lora_spec).make(lora_spec),
            attention=resolve("attention", backend.attention_backend, attention_spec).make(
                attention_spec
            ),
            fused=resolve("fused", backend.fused_backend, fused_spec).make(fused_spec),
        )
    except BackendError as error:
        raise ConfigError(str(error)) from None
