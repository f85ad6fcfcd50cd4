"""Starts a worker: model, backends and pool, sized to the machine."""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from loraplex.backends.fp8 import E4M3
from loraplex.backends.linear.contract import FP8, PLAIN
from loraplex.engine.adapters.reader import AdapterReader, make_reader
from loraplex.engine.adapters.table import AdapterTable
from loraplex.engine.adapters.target import AdapterTarget, VocabularyTarget
from loraplex.engine.checkpoint.locate import resolve_model
from loraplex.engine.checkpoint.quantization import quantization_of
from loraplex.engine.checkpoint.spec_loading import load_spec
from loraplex.engine.checkpoint.weights import load_weights
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError
from loraplex.engine.model.decoder import Decoder
from loraplex.engine.model.shard import shard_of
from loraplex.engine.model.spec import ModelSpec
from loraplex.engine.stores.open_stores import adapter_roots
from loraplex.engine.worker.adapters.weighted_rows import WeightedRows
from loraplex.engine.worker.backends import WorkerBackends, make_backends
from loraplex.engine.worker.model_runner import ModelRunner
from loraplex.engine.worker.pool_sizing import size_pool
from loraplex.engine.worker.ranks import Ranks, join_ranks
from loraplex.engine.worker.request_states import RequestStates
from loraplex.memory.device.pool import PagePool, PageShape, PoolSizeError
from loraplex.scheduler.adapters.binding import MAX_BINDINGS

logger = logging.getLogger("loraplex")

TYPICAL_RANK = 16
"""The rank of the adapters that the start-up line counts and the warm-up compiles for."""

WARM_UP_ROWS = 2048

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """Everything that `set_up` makes for a worker.

    Attributes:
        form: of the projections' weights, see LinearSpec.
        adapter_rank: the LoRA rank of a typical adapter, or the largest one accepted if less.
        adapter_pages: that such an adapter takes, on all projections.
    """

    spec: ModelSpec
    form: str
    model: Decoder
    ranks: Ranks
    device: torch.device
    max_model_len: int
    pool: PagePool
    target: AdapterTarget
    reader: AdapterReader
    table: AdapterTable
    runner: ModelRunner
    backends: WorkerBackends
    weight_bytes: int
    adapter_rank: int
    adapter_pages: int

    @property
    def base_fingerprint(self) -> str:
        """Names the base, and the types that decide the numbers in pages, for the prefix cache."""
        kv_dtype, weight_dtype = self.pool.shape.page_dtype, self.target.weight_dtype
        name = f"{self.spec.fingerprint}:{self.target.dtype}:{self.form}:{kv_dtype}"
        return f"{name}:{weight_dtype}" if weight_dtype is not None else name


def set_up(
    config: EngineConfig,
    rank: int,
    progress: Progress,
    store: str = "",
    on_layer: Callable[[], None] = lambda: None,
) -> WorkerParts:
    """Load this rank's part of the model and take the memory.

    Args:
        store: path of the file by which the ranks find each other; empty for one rank.
        on_layer: see Decoder.

    Raises:
        ConfigError: the model, a backend or the memory does not allow the configuration.
    """
    device = resolve_device(config.model.device, rank)
    path = resolve_model(config.model.model)
    spec = load_spec(path)
    world_size = config.parallel.tensor_parallel_size
    shard = shard_of(spec, worker_rank=rank if world_size > 1 else 0, world_size=world_size)
    ranks = join_ranks(rank, world_size, device, store)
    form = _form_of(config, path)
    dtype = resolve_dtype(config.model.dtype, spec, device, form)
    limit = _model_len_limit(config.model.max_model_len, spec)
    try:
        shape = PageShape(
            num_layers=spec.num_layers,
            block_tokens=config.memory.block_tokens,
            num_kv_heads=shard.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=dtype,
            kv_dtype=E4M3 if config.memory.kv_cache_dtype == "fp8" else None,
        )
    except PoolSizeError as error:
        raise ConfigError(str(error)) from None
    backends = make_backends(
        config,
        spec,
        shape,
        shard=shard,
        ranks=ranks,
        form=form,
        max_model_len=limit,
        device=device,
    )
    weights = f", projections in {form}" if form != PLAIN else ""
    progress(f"loading {path.name} as {str(dtype).removeprefix('torch.')}{weights} on {device}")
    model = Decoder(
        spec,
        dtype=dtype,
        device=device,
        shard=shard,
        linear=backends.linear,
        collective=backends.collective,
        on_layer=on_layer,
    )
    target = AdapterTarget(
        num_layers=spec.num_layers,
        modules=shard.modules,
        page_elems=shape.page_elems,
        dtype=dtype,
        max_rank=config.memory.max_lora_rank,
        weight_dtype=E4M3 if config.memory.adapter_dtype == "fp8" else None,
        pin_memory=device.type == "cuda",
        adapter_roots=adapter_roots(config),
        vocabulary=VocabularyTarget(
            tokens=shard.vocabulary,
            hidden_size=spec.hidden_size,
            is_tied=spec.tie_embeddings,
            max_rows=config.memory.max_token_rows,
            base="" if config.model.load_format == "dummy" else str(path),
        ),
    )
    reader = make_reader(target)  # its process starts while the weights are loaded
    load_weights(model, path, config.model.load_format, progress=sys.stderr.isatty())
    max_num_seqs, num_slots = config.scheduler.max_num_seqs, config.memory.max_adapter_slots
    table = AdapterTable(target, num_slots, device, num_weighted=max_num_seqs * MAX_BINDINGS)

    def make_runner(num_pages: int, max_model_len: int) -> ModelRunner:
        return ModelRunner(
            model=model,
            pool=PagePool(shape, num_pages, device),
            states=RequestStates(
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
                block_tokens=shape.block_tokens,
                vocab_size=spec.vocab_size,
                device=device,
                weighted_rows=WeightedRows(table.table, num_slots),
                vocabulary=table.vocabulary,
            ),
            lora_table=table.table,
            backends=backends,
            vocabulary=table.vocabulary,
        )

    num_pages = ranks.least(size_pool(config, shape, device, limit, make_runner))
    max_model_len = _fit_model_len(config.model.max_model_len, limit, num_pages, shape)
    adapter_rank = min(TYPICAL_RANK, config.memory.max_lora_rank)
    runner = make_runner(num_pages, max_model_len)
    if device.type == "cuda":
        runner.warm_up(min(WARM_UP_ROWS, config.scheduler.max_num_batched_tokens), adapter_rank)
        try:
            progress(runner.capture_graphs(config.graph, config.scheduler.max_num_batched_tokens))
        except torch.cuda.OutOfMemoryError as error:
            raise ConfigError(
                f"GPU memory ran out while CUDA graphs were captured ({error}); lower "
                "gpu_memory_utilization, raise graph_bytes, or set enforce_eager"
            ) from error
    adapter_pages = target.pages_of(adapter_rank)
    progress(
        f"pool of {num_pages} pages ({num_pages * shape.bytes_over_layers / 2**30:.2f} GiB): "
        f"{(num_pages - 1) * shape.block_tokens} tokens, or "
        f"{(num_pages - 1) // adapter_pages} adapters of rank {adapter_rank} on "
        f"all projections; contexts up to {max_model_len} tokens"
    )
    return WorkerParts(
        spec=spec,
        form=form,
        model=model,
        ranks=ranks,
        device=device,
        max_model_len=max_model_len,
        pool=runner.pool,
        target=target,
        reader=reader,
        table=table,
        runner=runner,
        backends=backends,
        weight_bytes=sum(slot.nbytes for slot in model.slots().values()),
        adapter_rank=adapter_rank,
        adapter_pages=adapter_pages,
    )


def _form_of(config: EngineConfig, model_path: Path) -> str:
    """Returns the form of the projections' weights, see LinearSpec."""
    if config.model.quantization == "fp8":
        return FP8
    stored = None if config.model.load_format == "dummy" else quantization_of(model_path)
    return FP8 if stored is not None and stored.is_fp8 else PLAIN


def resolve_device(name: str, rank: int) -> torch.device:
    """Returns the worker's device. Raises ConfigError if there is no such GPU."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but PyTorch finds no CUDA GPU")
    if rank >= torch.cuda.device_count():
        raise ConfigError(f"worker {rank} has no GPU: there are {torch.cuda.device_count()}")
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    return device


def resolve_dtype(
    name: str, spec: ModelSpec, device: torch.device, form: str = PLAIN
) -> torch.dtype:
    """Returns the type of activations, adapters, and weights in plain form.

    "auto" is float32 on a CPU. On a GPU it is the checkpoint's type, but bfloat16 for float32 and
    beside fp8 weights, whose products are in bfloat16.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    is_plain = spec.dtype is not torch.float32 and form == PLAIN
    return spec.dtype if is_plain else torch.bfloat16


def _model_len_limit(asked: int | None, spec: ModelSpec) -> int:
    if asked is not None and asked > spec.max_position:
        raise ConfigError(
            f"max_model_len {asked} is more than the {spec.max_position} tokens that "
            f"this model supports; lower it"
        )
    return asked or spec.max_position


def _fit_model_len(asked: int | None, limit: int, num_pages: int, shape: PageShape) -> int:
    """Returns the longest context: one such request must fit in the pool, without page 0."""
    capacity = (num_pages - 1) * shape.block_tokens
    if asked is not None and asked > capacity:
        raise ConfigError(
            f"max_model_len {asked} does not fit: the pool of {num_pages} pages holds {capacity} "
            f"tokens; lower max_model_len, or raise gpu_memory_utilization, pool_bytes or num_pages"
        )
    if limit > capacity:
        logger.warning("max_model_len is %d, not %d: the pool holds no more", capacity, limit)
    return min(limit, capacity)
