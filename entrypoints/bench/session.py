"""The engine of a benchmark, over a real or a dummy model, with its adapters."""

import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tqdm import tqdm

import loraplex
from loraplex.engine.adapters.paths import adapters_at_start
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError, EngineDeadError
from loraplex.entrypoints.bench import dummy
from loraplex.entrypoints.bench.measure import MEASURED, LoadGenerator, Timeline
from loraplex.entrypoints.bench.results import Results, Row
from loraplex.entrypoints.bench.traces import (
    TraceRequest,
    full_steps_trace,
    make_prompts,
    warm_up_trace,
)
from loraplex.entrypoints.offline.local_engine import LocalEngine

SLAB_BYTES = 256 << 20  # unit in which the host store grows
_MAX_CLIENT_BACKLOG = 1 << 18  # messages; this client reads nothing while it sends a burst
_DEATH_WAIT_S = 3.0


@dataclass(frozen=True, slots=True)
class RandomAdapters:
    """Shapes of the adapters that a benchmark writes where none is named."""

    ranks: Sequence[int]  # dealt to the adapters in turn
    modules: Sequence[str]  # some of names.MODULES
    num_weight_files: int  # further adapters link to one of these files


@dataclass
class BenchSession:
    """A running engine with its client, its adapters and a description of its set-up."""

    config: EngineConfig
    engine: LocalEngine
    generator: LoadGenerator
    adapters: list[tuple[str, str]]  # name and path, by number
    setup: Row
    results: Results
    num_runs: int = 0

    def measure(self, trace: Sequence[TraceRequest], *, title: str) -> list[Timeline]:
        """Run a trace once, with prompts that no earlier run has sent.

        Raises:
            ConfigError: a request is longer than the context, so its answer would be cut.
            EngineDeadError: a process of the engine ended.
        """
        longest = max(r.num_prompt_tokens + r.num_new_tokens for r in trace)
        if longest > self.engine.info.max_model_len:
            raise ConfigError(
                f"a request of {longest} tokens exceeds the engine's context of "
                f"{self.engine.info.max_model_len}: make prompts and answers shorter"
            )
        self.num_runs += 1
        vocab_size = self.engine.info.vocab_size
        prompts = make_prompts(trace, vocab_size, run=self.num_runs)
        try:
            timelines = self.generator.run(trace, prompts, title=title)
            for timeline in timelines:
                if isinstance(timeline.error, EngineDeadError):
                    raise timeline.error
        except EngineDeadError as error:
            raise EngineDeadError(self.engine.death(_DEATH_WAIT_S) or str(error)) from None
        return timelines

    def warm_up(self, trace: Sequence[TraceRequest]) -> None:
        """Compile every kernel and load every adapter of the trace before anything is measured.

        Runs full steps of the longest prompts, then the trace's own prompts with short answers.
        """
        limits = self.config.scheduler
        full = full_steps_trace(
            trace,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
        )
        short = warm_up_trace(trace, at_least=2 * limits.max_num_seqs)
        for requests in (full, short):
            self.measure(requests, title="warm-up")

    def counters(self) -> Row:
        """Counters of the engine since its start, by name."""
        return {k: v for k, v in self.engine.client.stats().items() if isinstance(v, int | float)}

    @staticmethod
    def idle_share(before: Row, after: Row) -> float:
        """Share of the GPU's time between two `counters` in which requests ran but no step did."""
        idle, busy = (after[name] - before[name] for name in ("idle_us", "busy_us"))
        return round(idle / (idle + busy), 4) if idle + busy else 0.0

    def write(self, row: Row) -> None:
        """Add a row to the results, with the set-up beside its numbers."""
        self.results.write({**self.setup, **row})


@contextmanager
def open_session(
    config: EngineConfig,
    num_adapters: int,
    *,
    random: RandomAdapters,
    results: Results,
    hold_all: bool = False,
) -> Iterator[BenchSession]:
    """Start an engine that knows at least `num_adapters` adapters.

    If `config` names none, random ones are written to a temporary directory, from which the client
    may load more. A model named as one of names.MODELS gets random weights.

    Args:
        results: the rows' destination.
        hold_all: enlarge the host store so that it holds all random adapters.

    Raises:
        ConfigError: `config` names fewer adapters, or the engine cannot start with it.
    """
    model = config.model.model
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as folder:
        config = _with_dummy_model(config, Path(folder))
        are_random = num_adapters > 0 and not adapters_at_start(config.adapter)
        if are_random:
            config = _with_random_adapters(
                config, random, num_adapters, Path(folder), hold_all=hold_all
            )
        server = replace(config.server, max_client_backlog=_MAX_CLIENT_BACKLOG)
        config = replace(config, server=server)
        adapters = adapters_at_start(config.adapter)
        if len(adapters) < num_adapters:
            raise ConfigError(
                f"the benchmark needs {num_adapters} adapters, and {len(adapters)} are named"
            )
        engine = LocalEngine(config, in_process=False)
        try:
            generator = LoadGenerator(
                engine.client,
                [name for name, _ in adapters],
                detokenize=not config.model.skip_tokenizer_init,
                max_open=min(server.max_requests_per_client, config.scheduler.max_queue_len),
            )
            setup = {**_machine(), **_engine_row(model, config, engine), "measured": MEASURED}
            if are_random:
                setup |= {"ranks": list(random.ranks), "lora_modules": list(random.modules)}
            yield BenchSession(config, engine, generator, adapters, setup, results)
        finally:
            engine.close()


def _with_dummy_model(config: EngineConfig, folder: Path) -> EngineConfig:
    """Replace a dummy model's name by a directory. Random weights have no tokenizer."""
    model = config.model
    if model.model in dummy.MODELS and not Path(model.model).exists():
        path = str(dummy.write_model(folder / model.model, model.model))
        model = replace(model, model=path, load_format="dummy")
    if model.load_format == "dummy":
        model = replace(model, skip_tokenizer_init=True)
    return replace(config, model=model)


def _with_random_adapters(
    config: EngineConfig,
    random: RandomAdapters,
    num_adapters: int,
    folder: Path,
    *,
    hold_all: bool,
) -> EngineConfig:
    writer = dummy.AdapterWriter(
        dummy.read_config(config.model.model),
        ranks=random.ranks,
        modules=random.modules,
        num_weight_files=random.num_weight_files,
    )
    numbers = tqdm(range(num_adapters), desc="writing adapters", disable=None, leave=False)
    pairs = tuple((f"a{i}", str(writer.write(folder / f"a{i}", i))) for i in numbers)
    adapter = replace(config.adapter, adapters=pairs, adapter_root=str(folder))
    memory = config.memory
    num_bytes = sum(map(writer.num_bytes, range(num_adapters)))
    if hold_all:
        room = num_bytes + num_bytes // 4 + SLAB_BYTES  # the last page of an adapter is not full
        memory = replace(memory, adapter_host_bytes=max(room, memory.adapter_host_bytes))
    elif num_bytes > memory.adapter_host_bytes:
        print(
            f"note: the {num_adapters} adapters take {num_bytes:,} bytes, more than the host store "
            f"({memory.adapter_host_bytes:,}), so some are read from disk again; "
            "--adapter-host-bytes enlarges it",
            file=sys.stderr,
        )
    return replace(config, adapter=adapter, memory=memory)


def _machine() -> Row:
    versions = {"loraplex": loraplex.__version__, "python": platform.python_version()}
    for package in ("torch", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _engine_row(model: str, config: EngineConfig, engine: LocalEngine) -> Row:
    worker = engine.info.workers[0]
    return {
        **asdict(config.memory),
        **asdict(config.scheduler),
        **asdict(config.graph),
        **asdict(config.parallel),
        "model": model or "SmolLM2-135M-Instruct",
        "load_format": config.model.load_format,
        "dtype": config.model.dtype,
        "quantization": config.model.quantization,
        "device": worker.device,
        "lora_backend": worker.lora_backend,
        "attention_backend": worker.attention_backend,
        "linear_backend": worker.linear_backend,
        "num_pages": engine.info.num_pages,
        "block_tokens": engine.info.block_tokens,
        "load_seconds": round(worker.load_seconds, 2),
    }
