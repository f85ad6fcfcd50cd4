"""Chooses and makes the backends of one worker, for its model's sizes."""

import logging
from dataclasses import dataclass

import torch

from loraplex.backends.attention.contract import AttentionOp, AttentionSpec
from loraplex.backends.collective.contract import CollectiveOp, CollectiveSpec
from loraplex.backends.fp8 import E4M3
from loraplex.backends.fused.contract import FusedOps, FusedSpec
from loraplex.backends.linear.contract import FP8, LinearOp, LinearSpec
from loraplex.backends.lora.contract import LoRAOp, LoRASpec
from loraplex.backends.lora.touched import TouchedGroups
from loraplex.backends.lora.vectors.op import VectorLoRA, make_vector_lora
from loraplex.backends.registry import BackendError, list_backends, resolve
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError
from loraplex.engine.model.decoder import projection_groups
from loraplex.engine.model.shard import Shard
from loraplex.engine.model.spec import ModelSpec
from loraplex.engine.worker.ranks import Ranks
from loraplex.memory.device.pool import PageShape

logger = logging.getLogger("loraplex")

MAX_GATHERED_ROWS = 256
"""Rows of logits that are gathered at one time, at least: prompt log-probabilities and steps with
drafts take as many."""


@dataclass(frozen=True, slots=True)
class WorkerBackends:
    """One backend for each op. Their `name` is the registry's."""

    lora: LoRAOp
    attention: AttentionOp
    fused: FusedOps
    linear: LinearOp
    collective: CollectiveOp | None = None  # None: one rank holds the whole model


def make_backends(
    config: EngineConfig,
    spec: ModelSpec,
    shape: PageShape,
    *,
    shard: Shard,
    ranks: Ranks,
    form: str,
    max_model_len: int,
    device: torch.device,
) -> WorkerBackends:
    """Make the configured backends, or the best that can run here, for this rank's shard.

    Args:
        form: of the projections' weights, see LinearSpec.

    Raises:
        ConfigError: a configured backend is unknown or cannot run here.
    """
    scheduler, backend = config.scheduler, config.backend
    groups = projection_groups(shard.modules)
    lora_spec = LoRASpec(
        max_num_tokens=scheduler.max_num_batched_tokens,
        max_rank=config.memory.max_lora_rank,
        dtype=shape.dtype,
        device=device,
        page_elems=shape.page_elems,
        groups=groups,
        weight_dtype=E4M3 if config.memory.adapter_dtype == "fp8" else None,
    )
    attention_spec = AttentionSpec(
        num_heads=shard.num_heads,
        num_kv_heads=shard.num_kv_heads,
        head_dim=spec.head_dim,
        block_tokens=shape.block_tokens,
        scale=spec.head_dim**-0.5,
        dtype=shape.dtype,
        device=device,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_tokens=scheduler.max_num_batched_tokens,
        max_pages=-(-(max_model_len + 1) // shape.block_tokens),
        kv_dtype=shape.page_dtype,
    )
    fused_spec = FusedSpec(dtype=shape.dtype, device=device, head_dim=spec.head_dim)
    sizes = tuple((sum(group.out_features), group.in_features) for group in groups)
    linear_spec = LinearSpec(shape.dtype, device, form, sizes)
    try:
        fused = resolve("fused", backend.fused_backend, fused_spec).make(fused_spec)
        return WorkerBackends(
            lora=_make_lora(backend.lora_backend, lora_spec),
            attention=resolve("attention", backend.attention_backend, attention_spec).make(
                attention_spec
            ),
            fused=fused,
            linear=_make_linear(backend.linear_backend, linear_spec),
            collective=_make_collective(config, spec, shape, shard, ranks, device, fused),
        )
    except BackendError as error:
        raise ConfigError(str(error)) from None


def _make_lora(name: str, spec: LoRASpec) -> VectorLoRA:
    op = resolve("lora", name, spec).make(spec)
    qkv, output = spec.groups[:2]  # see projection_groups
    touched = TouchedGroups(op, groups=spec.groups, attention=(qkv, output))
    return make_vector_lora(touched, spec)


def _make_linear(name: str, spec: LinearSpec) -> LinearOp:
    found = resolve("linear", name, spec)
    if spec.form == FP8 and found.name != FP8:
        reasons = [b.probe(spec) for b in list_backends("linear") if b.name == FP8]
        logger.warning(
            "weights are rounded to fp8, but kept in %s, so no memory is saved: %s",
            str(spec.dtype).removeprefix("torch."),
            reasons[0] or "linear_backend is set",
        )
    op: LinearOp = found.make(spec)
    return op


def _make_collective(
    config: EngineConfig,
    spec: ModelSpec,
    shape: PageShape,
    shard: Shard,
    ranks: Ranks,
    device: torch.device,
    fused: FusedOps,
) -> CollectiveOp | None:
    if ranks.group is None:
        return None
    collective_spec = CollectiveSpec(
        worker_rank=ranks.worker_rank,
        world_size=ranks.world_size,
        group=ranks.group,
        device=device,
        dtype=shape.dtype,
        hidden_size=spec.hidden_size,
        max_num_tokens=max(config.scheduler.max_num_batched_tokens, config.scheduler.max_num_seqs),
        max_num_samples=max(config.scheduler.max_num_seqs, MAX_GATHERED_ROWS),
        gather_width=shard.vocabulary.size,
        fused=fused,
    )
    name = config.backend.collective_backend
    op: CollectiveOp = resolve("collective", name, collective_spec).make(collective_spec)
    return op
