"""Start of a worker: model, backends and pool, sized to the machine."""

import gc
import logging
import sys
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from loraplex.backends.attention.contract import AttentionOp, AttentionSpec
from loraplex.backends.lora.contract import LoRAOp, LoRASpec
from loraplex.backends.registry import BackendError, resolve
from loraplex.engine.adapter_table import AdapterTable
from loraplex.engine.adapters import AdapterTarget
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError
from loraplex.engine.model_runner import ModelRunner
from loraplex.engine.models.decoder import Decoder
from loraplex.engine.models.packaged import resolve_model
from loraplex.engine.models.registry import load_spec
from loraplex.engine.models.spec import ModelSpec
from loraplex.engine.request_states import RequestStates
from loraplex.engine.weights import load_weights
from loraplex.memory.pool import (
    PagePool,
    PageShape,
    PoolSizeError,
    choose_num_pages,
    free_cpu_bytes,
    free_gpu_bytes,
)
from loraplex.scheduler.plan import NewRequest, SamplingSpec, StepPlan, int_array

logger = logging.getLogger("loraplex")

GPU_MARGIN_BYTES = 512 << 20
"""Kept free on a GPU for library workspaces, gathers of attention fallbacks and fragmentation."""

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """All that a worker works with."""

    spec: ModelSpec
    device: torch.device
    max_model_len: int
    pool: PagePool
    target: AdapterTarget
    table: AdapterTable
    runner: ModelRunner
    lora_backend: str
    attention_backend: str


def set_up(config: EngineConfig, rank: int, progress: Progress) -> WorkerParts:
    """Load the model and take the memory.

    Raises:
        ConfigError: the model, a backend or the memory does not allow what is configured.
    """
    device = resolve_device(config.model.device, rank)
    path = resolve_model(config.model.model)
    spec = load_spec(path)
    dtype = resolve_dtype(config.model.dtype, spec, device)
    limit = _model_len_limit(config.model.max_model_len, spec)
    try:
        shape = PageShape(
            num_layers=spec.num_layers,
            block_tokens=config.memory.block_tokens,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=dtype,
        )
    except PoolSizeError as error:
        raise ConfigError(str(error)) from None
    lora_name, lora, attention_name, attention = _make_backends(config, spec, shape, device)
    progress(f"loading {path.name} as {str(dtype).removeprefix('torch.')} on {device}")
    model = Decoder(spec, dtype=dtype, device=device)
    load_weights(model, path, config.model.load_format, progress=sys.stderr.isatty())
    target = AdapterTarget(
        num_layers=spec.num_layers,
        shapes=model.module_shapes(),
        page_elems=shape.page_elems,
        dtype=dtype,
        max_rank=config.memory.max_lora_rank,
        pin_memory=device.type == "cuda",
    )
    table = AdapterTable(target, config.memory.max_adapter_slots, device)

    def make_runner(num_pages: int, max_model_len: int) -> ModelRunner:
        return ModelRunner(
            model=model,
            pool=PagePool(shape, num_pages, device),
            states=RequestStates(
                max_num_seqs=config.scheduler.max_num_seqs,
                max_model_len=max_model_len,
                block_tokens=shape.block_tokens,
                vocab_size=spec.vocab_size,
                device=device,
            ),
            lora_table=table.table,
            lora=lora,
            attention=attention,
        )

    num_pages = _size_pool(config, shape, device, limit, make_runner)
    max_model_len = _fit_model_len(config.model.max_model_len, limit, num_pages, shape)
    runner = make_runner(num_pages, max_model_len)
    progress(
        f"pool of {num_pages} pages ({num_pages * shape.bytes_over_layers / 2**30:.2f} GiB, "
        f"{(num_pages - 1) * shape.block_tokens} tokens), contexts up to {max_model_len} tokens"
    )
    return WorkerParts(
        spec=spec,
        device=device,
        max_model_len=max_model_len,
        pool=runner.pool,
        target=target,
        table=table,
        runner=runner,
        lora_backend=lora_name,
        attention_backend=attention_name,
    )


def resolve_device(name: str, rank: int) -> torch.device:
    """Raises ConfigError: there is no such GPU."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was asked for, but PyTorch finds no CUDA GPU")
    if rank >= torch.cuda.device_count():
        raise ConfigError(f"worker {rank} has no GPU: there are {torch.cuda.device_count()}")
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    return device


def resolve_dtype(name: str, spec: ModelSpec, device: torch.device) -> torch.dtype:
    """The type of weights and KV cache. auto: float32 on a CPU; on a GPU the checkpoint's, and
    bfloat16 for one in float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if spec.dtype is torch.float32 else spec.dtype


def _model_len_limit(asked: int | None, spec: ModelSpec) -> int:
    if asked is not None and asked > spec.max_position:
        raise ConfigError(
            f"max_model_len {asked} is more than the {spec.max_position} tokens that "
            f"this model was made for"
        )
    return asked or spec.max_position


def _fit_model_len(asked: int | None, limit: int, num_pages: int, shape: PageShape) -> int:
    """At least one request of the greatest length must fit in the pool, without page 0."""
    capacity = (num_pages - 1) * shape.block_tokens
    if asked is not None and asked > capacity:
        raise ConfigError(
            f"max_model_len {asked} does not fit: the pool of {num_pages} pages holds {capacity} "
            f"tokens; lower max_model_len, or raise gpu_memory_utilization, pool_bytes or num_pages"
        )
    if limit > capacity:
        logger.warning("max_model_len is %d, what the pool holds, not %d", capacity, limit)
    return min(limit, capacity)


def _make_backends(
    config: EngineConfig, spec: ModelSpec, shape: PageShape, device: torch.device
) -> tuple[str, LoRAOp, str, AttentionOp]:
    lora_spec = LoRASpec(
        max_num_tokens=config.scheduler.max_num_batched_tokens,
        max_rank=config.memory.max_lora_rank,
        dtype=shape.dtype,
        device=device,
    )
    attention_spec = AttentionSpec(
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        block_tokens=shape.block_tokens,
        scale=spec.head_dim**-0.5,
        dtype=shape.dtype,
        device=device,
    )
    try:
        lora = resolve("lora", config.backend.lora_backend, lora_spec)
        attention = resolve("attention", config.backend.attention_backend, attention_spec)
    except BackendError as error:
        raise ConfigError(str(error)) from None
    return lora.name, lora.make(lora_spec), attention.name, attention.make(attention_spec)


def _size_pool(
    config: EngineConfig,
    shape: PageShape,
    device: torch.device,
    limit: int,
    make_runner: Callable[[int, int], ModelRunner],
) -> int:
    """Pages of the pool: as asked, or by the memory that is left."""
    memory = config.memory
    try:
        if memory.num_pages is not None or memory.pool_bytes is not None:
            return choose_num_pages(memory, shape, 0)
        if device.type == "cpu":
            return choose_num_pages(memory, shape, free_cpu_bytes())
        free = free_gpu_bytes(
            device,
            memory.gpu_memory_utilization,
            activation_bytes=_activation_bytes(config, shape, device, limit, make_runner),
            margin_bytes=GPU_MARGIN_BYTES,
        )
        states = RequestStates.device_bytes(
            config.scheduler.max_num_seqs, limit, shape.block_tokens
        )
        return choose_num_pages(memory, shape, free - states)
    except PoolSizeError as error:
        raise ConfigError(str(error)) from None


def _activation_bytes(
    config: EngineConfig,
    shape: PageShape,
    device: torch.device,
    limit: int,
    make_runner: Callable[[int, int], ModelRunner],
) -> int:
    """Peak of the largest prefill and of the largest sampling step, run on a pool of their own."""
    budget, max_num_seqs = config.scheduler.max_num_batched_tokens, config.scheduler.max_num_seqs
    length = min(limit, budget)
    num_seqs = min(max_num_seqs, budget // length)
    pages_each = -(-length // shape.block_tokens)
    num_pages = 1 + max(num_seqs * pages_each, max_num_seqs)
    runner = make_runner(num_pages, length)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    for count, tokens in ((num_seqs, length), (max_num_seqs, 1)):
        runner.launch(_trial_plan(count, tokens, shape.block_tokens)).result()
    peak = torch.cuda.max_memory_allocated(device) - before
    del runner
    gc.collect()
    return peak


def _trial_plan(num_seqs: int, num_tokens: int, block_tokens: int) -> StepPlan:
    """`num_seqs` new requests that all sample, with the parameters that cost most memory."""
    pages_each = -(-num_tokens // block_tokens)
    sampling: dict[str, Any] = {
        "temperature": 1.0,
        "top_p": 0.9,
        "top_k": 50,
        "min_p": 0.01,
        "seed": 0,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
        "max_tokens": 1,
        "min_tokens": 0,
        "stop_token_ids": int_array(),
        "num_logprobs": 0,
        "num_prompt_logprobs": -1,
        "bias_token_ids": int_array(),
        "bias_values": array("f"),
    }
    requests = [
        NewRequest(
            slot=slot,
            token_ids=int_array([0] * num_tokens),
            num_prompt_tokens=num_tokens,
            page_ids=int_array(list(range(1 + slot * pages_each, 1 + (slot + 1) * pages_each))),
            adapter_slot=-1,
            sampling=SamplingSpec(**sampling),
        )
        for slot in range(num_seqs)
    ]
    return StepPlan(
        step_id=0,
        freed_slots=int_array(),
        new_requests=requests,
        page_slots=int_array(),
        page_ids=int_array(),
        slots=int_array(list(range(num_seqs))),
        positions=int_array([0] * num_seqs),
        num_tokens=int_array([num_tokens] * num_seqs),
        samples=int_array([1] * num_seqs),
    )
