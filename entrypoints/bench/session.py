"""The engine of a benchmark, over a real or a dummy model, with its adapters."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError, EngineDeadError
from loraplex.engine.ipc.messages.frontend import EngineInfo
from loraplex.entrypoints.bench.measure import LoadGenerator, Timeline
from loraplex.entrypoints.bench.results import Results, Row
from loraplex.entrypoints.bench.setup import BenchSetup, RandomAdapters, make_setup
from loraplex.entrypoints.bench.traces import (
    TraceRequest,
    full_steps_trace,
    make_prompts,
    warm_up_trace,
)
from loraplex.entrypoints.client.sync_client import Client
from loraplex.entrypoints.offline.local_engine import LocalEngine

_DEATH_WAIT_S = 3.0


class BenchEngine(Protocol):
    """A running engine, or a router that looks like one. A LocalEngine is one."""

    endpoint: str
    info: EngineInfo
    client: Client

    def death(self, wait_s: float = 0.0) -> str | None:
        """Returns which process died and how, None if none dies within `wait_s` seconds."""


@dataclass(slots=True)
class ConnectedEngine:
    """An engine or a router whose processes this one does not watch."""

    endpoint: str
    info: EngineInfo
    client: Client

    def death(self, wait_s: float = 0.0) -> str | None:
        return None


@dataclass
class BenchSession:
    """A running engine with its client, its adapters and a description of its set-up."""

    config: EngineConfig
    engine: BenchEngine
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
    with make_setup(config, num_adapters, random=random, hold_all=hold_all) as setup:
        engine = LocalEngine(setup.config, in_process=False)
        try:
            yield make_session(setup, engine, setup.row_of(engine.info), results)
        finally:
            engine.close()


def make_session(
    setup: BenchSetup, engine: BenchEngine, row: Row, results: Results
) -> BenchSession:
    """Returns a session over a running engine, whose rows begin with `row`."""
    config = setup.config
    limits = (config.server.max_requests_per_client, config.scheduler.max_queue_len)
    generator = LoadGenerator(
        engine.client,
        [name for name, _ in setup.adapters],
        detokenize=not config.model.skip_tokenizer_init,
        max_open=min(limits),
    )
    return BenchSession(config, engine, generator, setup.adapters, row, results)
