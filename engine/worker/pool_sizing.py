"""Computes the pages of a worker's pool: the memory that the model and the largest steps leave."""

import gc
from array import array
from collections.abc import Callable
from typing import Any

import torch

from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError
from loraplex.engine.worker.model_runner import ModelRunner
from loraplex.engine.worker.request_states import RequestStates
from loraplex.memory.device.page_copier import NUM_STAGING_BUFFERS, STAGING_BYTES
from loraplex.memory.device.pool import (
    PageShape,
    PoolSizeError,
    choose_num_pages,
    free_cpu_bytes,
    free_gpu_bytes,
)
from loraplex.scheduler.speculation.draft_limits import MAX_SAMPLED
from loraplex.scheduler.worker_protocol import NewRequest, SamplingSpec, StepPlan, int_array

GPU_MARGIN_BYTES = 512 << 20
"""GPU memory kept free for library workspaces, gathers of fallback attention and fragmentation."""


def size_pool(
    config: EngineConfig,
    shape: PageShape,
    device: torch.device,
    limit: int,
    make_runner: Callable[[int, int], ModelRunner],
) -> int:
    """Returns the pages of the pool: as configured, or as many as the free memory holds.

    Args:
        limit: the longest context.
        make_runner: takes the pages of the pool and the longest context.

    Raises:
        ConfigError: the pool would have too few pages.
    """
    memory = config.memory
    try:
        if memory.num_pages is not None or memory.pool_bytes is not None:
            return choose_num_pages(memory, shape, 0)
        if device.type == "cpu":
            return choose_num_pages(memory, shape, free_cpu_bytes())
        graph_bytes = 0 if config.graph.enforce_eager else config.graph.graph_bytes
        free = free_gpu_bytes(
            device,
            memory.gpu_memory_utilization,
            activation_bytes=_activation_bytes(config, shape, device, limit, make_runner),
            margin_bytes=GPU_MARGIN_BYTES + graph_bytes + NUM_STAGING_BUFFERS * STAGING_BYTES,
        )
        states = RequestStates.device_bytes(config.scheduler.max_num_seqs, limit)
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
    """Returns the peak memory of the largest prefill and the largest sampling step. They run on a
    pool of their own."""
    budget, max_num_seqs = config.scheduler.max_num_batched_tokens, config.scheduler.max_num_seqs
    length = min(limit, budget)
    num_seqs = min(max_num_seqs, budget // length)
    pages_each = -(-length // shape.block_tokens)
    samples = 1  # of each row of the largest sampling step
    if config.scheduler.speculation is not None:
        samples = min(length, -(-MAX_SAMPLED // max_num_seqs))
    num_pages = 1 + max(num_seqs * pages_each, max_num_seqs * -(-samples // shape.block_tokens))
    runner = make_runner(num_pages, length)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    runner.launch(_largest_plan(num_seqs, length, 1, shape.block_tokens)).result()
    runner.launch(_largest_plan(max_num_seqs, samples, samples, shape.block_tokens)).result()
    peak = torch.cuda.max_memory_allocated(device) - before
    del runner
    gc.collect()
    return peak


def _largest_plan(num_seqs: int, num_tokens: int, samples: int, block_tokens: int) -> StepPlan:
    """Returns a step of `num_seqs` new requests that all sample, with the parameters that take the
    most memory. All but one of a row's samples follow drafts."""
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
            bindings=[],
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
        samples=int_array([samples] * num_seqs),
        draft_ids=int_array([0] * (samples - 1) * num_seqs),
    )
