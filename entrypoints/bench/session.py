"""What every benchmark needs: an engine over a real or a dummy model, adapters, a results file."""

import argparse
import json
import platform
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import loraplex
from loraplex.engine.adapter_paths import adapters_at_start
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError, EngineDeadError
from loraplex.entrypoints import flags
from loraplex.entrypoints.bench import dummy
from loraplex.entrypoints.bench.measure import MEASURED, LoadGenerator, Timeline
from loraplex.entrypoints.bench.traces import TraceRequest, make_prompts, warm_up_trace
from loraplex.entrypoints.local_engine import LocalEngine

Row = dict[str, Any]
_MAX_CLIENT_BACKLOG = 1 << 18  # tokens of a whole batch may wait while requests are sent
_DEATH_WAIT_S = 3.0


@dataclass
class BenchSession:
    """A running engine, and what it is."""

    config: EngineConfig
    engine: LocalEngine
    generator: LoadGenerator
    setup: Row
    out: Path | None
    num_runs: int = 0

    def measure(self, trace: Sequence[TraceRequest], *, title: str) -> list[Timeline]:
        """Run a trace once, with prompts that no earlier run has sent.

        Raises:
            ConfigError: a request is longer than the context, where its answer would be cut.
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
        """Compile what compiles late, and load every adapter of the trace once."""
        short = warm_up_trace(trace, at_least=self.config.scheduler.max_num_seqs)
        self.measure(short, title="warm-up")

    def counters(self) -> Row:
        """Numbers that the engine counts since its start."""
        return {k: v for k, v in self.engine.client.stats().items() if isinstance(v, int | float)}

    @staticmethod
    def idle_share(before: Row, after: Row) -> float:
        """Of the GPU's time between two `counters` while requests were running: how much of it
        had no step to work on."""
        idle, busy = (after[name] - before[name] for name in ("idle_us", "busy_us"))
        return round(idle / (idle + busy), 4) if idle + busy else 0.0

    def write(self, row: Row) -> None:
        """Append a JSON line: the set-up beside the numbers."""
        if self.out is not None:
            with self.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**self.setup, **row}) + "\n")


@contextmanager
def open_session(args: argparse.Namespace, num_adapters: int) -> Iterator[BenchSession]:
    """Start an engine with at least `num_adapters` adapters known.

    They are those that the flags name; where none is named, random ones of --ranks on
    --lora-modules, written to a temporary directory.

    Raises:
        ConfigError: the flags name fewer adapters, or the engine cannot start like this.
    """
    if args.out is not None and not args.out.parent.is_dir():
        raise ConfigError(f"--out: there is no directory {args.out.parent}")
    config = flags.engine_config_of(args)
    name = config.model.model
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as folder:
        config = _with_dummy_model(config, Path(folder))
        config, are_random = _with_adapters(config, args, num_adapters, Path(folder))
        server = replace(config.server, max_client_backlog=_MAX_CLIENT_BACKLOG)
        config = replace(config, server=server)
        engine = LocalEngine(config, in_process=False)
        try:
            generator = LoadGenerator(
                engine.client,
                [name for name, _ in adapters_at_start(config.adapter)],
                detokenize=not config.model.skip_tokenizer_init,
                max_open=min(server.max_requests_per_client, config.scheduler.max_queue_len),
            )
            setup = {**_machine(), **_engine_row(name, config, engine), "measured": MEASURED}
            if are_random:
                setup |= {"ranks": args.ranks, "lora_modules": args.lora_modules}
            yield BenchSession(config, engine, generator, setup, args.out)
        finally:
            engine.close()


def _with_dummy_model(config: EngineConfig, folder: Path) -> EngineConfig:
    """One of the dummy names becomes a directory; random weights have no tokenizer."""
    model = config.model
    if model.model in dummy.MODELS and not Path(model.model).exists():
        path = str(dummy.write_model(folder / model.model, model.model))
        model = replace(model, model=path, load_format="dummy")
    if model.load_format == "dummy":
        model = replace(model, skip_tokenizer_init=True)
    return replace(config, model=model)


def _with_adapters(
    config: EngineConfig, args: argparse.Namespace, num_adapters: int, folder: Path
) -> tuple[EngineConfig, bool]:
    """The configuration with adapters, and whether they are random ones."""
    given = adapters_at_start(config.adapter)
    if given and len(given) < num_adapters:
        raise ConfigError(f"{num_adapters} adapters are needed, and {len(given)} were named")
    if given or not num_adapters:
        return config, False
    writer = dummy.AdapterWriter(
        dummy.read_config(config.model.model), ranks=args.ranks, modules=args.lora_modules
    )
    pairs = tuple(
        (f"a{index}", str(writer.write(folder / f"a{index}", index)))
        for index in range(num_adapters)
    )
    return replace(config, adapter=replace(config.adapter, adapters=pairs)), True


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
        "model": model or "SmolLM2-135M-Instruct",
        "load_format": config.model.load_format,
        "dtype": config.model.dtype,
        "device": worker.device,
        "lora_backend": worker.lora_backend,
        "attention_backend": worker.attention_backend,
        "num_pages": engine.info.num_pages,
        "block_tokens": engine.info.block_tokens,
        "max_num_seqs": config.scheduler.max_num_seqs,
        "max_num_batched_tokens": config.scheduler.max_num_batched_tokens,
        "max_steps_in_flight": config.scheduler.max_steps_in_flight,
        "load_seconds": round(worker.load_seconds, 2),
    }


class Table:
    """Rows printed as they come, under one head."""

    def __init__(self, **widths: int) -> None:
        """Column names and widths; a negative width is left-aligned."""
        self._widths = widths
        print("  ".join(f"{k:{_align(w)}}" for k, w in widths.items()), flush=True)

    def add(self, row: Row) -> None:
        cells = []
        for name, width in self._widths.items():
            value = row.get(name, "-")
            text = f"{value:,.2f}" if isinstance(value, float) else str(value)
            cells.append(f"{text:{_align(width)}}")
        print("  ".join(cells), flush=True)


def _align(width: int) -> str:
    return f">{width}" if width > 0 else f"<{-width}"
