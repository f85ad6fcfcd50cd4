"""`loraplex bench cluster`: engines behind one router, beside one of them alone."""

import argparse
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from loraplex.engine.cluster.engine_cluster import EngineCluster
from loraplex.engine.cluster.launch.launchers import NO_RAY
from loraplex.engine.config import EngineConfig
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.engine.ipc.messages.frontend import EngineInfo
from loraplex.engine.processes.engine import Engine
from loraplex.entrypoints.bench.cluster.engine_strike import EngineStrike
from loraplex.entrypoints.bench.cluster.running_cluster import connect_running
from loraplex.entrypoints.bench.measure import check_complete, percentiles, summarize
from loraplex.entrypoints.bench.panels import cluster_panels
from loraplex.entrypoints.bench.results import Results, Row, Table
from loraplex.entrypoints.bench.session import BenchSession, ConnectedEngine, make_session
from loraplex.entrypoints.bench.setup import BenchSetup, RandomAdapters, make_setup
from loraplex.entrypoints.bench.traces import TraceRequest, make_prompts, make_trace
from loraplex.entrypoints.client.sync_client import Client

PROMPT_LEN, SHORT_ANSWER, LONG_ANSWER = 32, 8, 1024
MAX_SINGLES = 200  # requests that are sent one by one
STREAMS = 32  # for each engine, when one is killed
RUNS_OF_ENGINE = 1 << 10  # run numbers, so that no two sessions send equal prompts


def run(args: argparse.Namespace, config: EngineConfig) -> int:
    """Measure a cluster that is started for this, or a running one if --endpoint names it."""
    results = Results(args.out, args.plot, cluster_panels)
    if args.endpoint:
        with connect_running(args, config, results) as session:
            num_engines = len(session.engine.client.stats()["router"]["engines"])
            bench = ClusterBench(args, session, num_engines)
            bench.measure_router()
        return 0
    random = RandomAdapters(args.ranks, args.lora_modules, args.weight_files)
    with make_setup(config, args.num_adapters, random=random) as setup:
        _start_and_measure(args, setup, results)
    return 0


def _start_and_measure(args: argparse.Namespace, setup: BenchSetup, results: Results) -> None:
    num_engines = args.engines or 2
    server = replace(setup.config.server, endpoint="")
    cluster = EngineCluster(
        replace(setup.config, server=server),
        num_engines=num_engines,
        placement=args.placement,
        ray_address=NO_RAY,
    )
    cluster.start()
    with cluster:
        engines = [engine for engine in cluster.engines.values() if isinstance(engine, Engine)]
        info = engines[0].info
        row = setup.row_of(info) | {"placement": args.placement}
        with _connect(setup, cluster.endpoint, info, row, results) as router:
            bench = ClusterBench(args, router, num_engines, cluster.router_pid)
            for number, engine in reversed(list(enumerate(engines, 1))):
                with _connect(setup, engine.endpoint, info, row, results) as session:
                    session.num_runs = number * RUNS_OF_ENGINE
                    session.warm_up(bench.trace(args.num_requests))
                    if number == 1:
                        bench.measure_engine(session)
            bench.measure_router()
            if args.kill:
                bench.kill_one(cluster)


@contextmanager
def _connect(
    setup: BenchSetup, endpoint: str, info: EngineInfo, row: Row, results: Results
) -> Iterator[BenchSession]:
    with Client(endpoint) as client:
        yield make_session(setup, ConnectedEngine(endpoint, info, client), row, results)


class ClusterBench:
    """Measures the cases, and adds each one to the table and the results."""

    def __init__(
        self,
        args: argparse.Namespace,
        router: BenchSession,
        num_engines: int,
        router_pid: int | None = None,
    ) -> None:
        """`router_pid` is known for a cluster that was started here."""
        self._args = args
        self._router = router
        self._num_engines = num_engines
        self._router_pid = router_pid
        self._one_engine_rate: float | None = None
        self._table = Table(
            case=-18, num_requests=12, new_tokens_per_s=16, of_linear=9, alone_ttft_ms_p50=17,
            alone_ttft_ms_p99=17, router_cores=12, moves=6, longest_pause_s=15,
        )  # fmt: skip

    def trace(self, num_requests: int) -> list[TraceRequest]:
        """Returns a closed trace as the flags describe it."""
        args = self._args
        return make_trace(
            num_requests,
            args.num_adapters,
            popularity=args.popularity,
            alpha=args.alpha,
            lengths=args.lengths,
        )

    def measure_engine(self, session: BenchSession) -> None:
        """Measures one engine through its own frontend."""
        row = self._measure(session, self.trace(self._args.num_requests), "one engine")
        self._one_engine_rate = row["new_tokens_per_s"]
        self._write("one engine", row | {"engines": 1})

    def measure_router(self) -> None:
        """Measures all engines through the router, with as many requests for each of them."""
        trace = self.trace(self._args.num_requests * self._num_engines)
        if self._one_engine_rate is None:  # no engine is warm yet
            self._router.warm_up(trace)
        row = self._measure(self._router, trace, "cluster")
        if self._one_engine_rate:
            linear = self._one_engine_rate * self._num_engines
            row["of_linear"] = round(row["new_tokens_per_s"] / linear, 4)
        self._write("cluster", row)

    def kill_one(self, cluster: EngineCluster) -> None:
        """Kills an engine once half of the streams run. All must end complete."""
        room = self._router.engine.info.max_model_len - PROMPT_LEN
        num_streams = STREAMS * self._num_engines
        adapters = _adapters_in_turn(self._args.num_adapters, num_streams)
        trace = [TraceRequest(a, PROMPT_LEN, min(LONG_ANSWER, room)) for a in adapters]
        num_running = min(
            num_streams, self._num_engines * self._router.config.scheduler.max_num_seqs
        )
        before = self._moves()
        with EngineStrike(cluster, num_running // 2) as strike:
            timelines = self._router.measure(trace, title="one engine is killed")
        check_complete(timelines, trace)
        pauses = [max(timeline.gaps_s(), default=0.0) for timeline in timelines]
        row: Row = {
            "num_requests": num_streams,
            "killed": strike.killed,
            "moves": self._moves() - before,
            "longest_pause_p50_s": round(statistics.median(pauses), 3),
            "longest_pause_s": round(max(pauses), 3),
        }
        self._write("one engine killed", row | summarize(timelines))

    def _measure(self, session: BenchSession, trace: Sequence[TraceRequest], title: str) -> Row:
        """Returns the figures of a trace that is sent at once, and of requests that are alone."""
        is_router = session is self._router
        pid = self._router_pid if is_router else None
        moves = self._moves() if is_router else 0
        before, start = _cpu_seconds(pid), time.perf_counter()
        timelines = session.measure(trace, title=title)
        cores = (_cpu_seconds(pid) - before) / (time.perf_counter() - start)
        check_complete(timelines, trace)
        row: Row = {"num_requests": len(trace), **summarize(timelines)}
        row |= percentiles("alone_ttft_ms", self._first_tokens_s(session))
        if is_router:
            row["moves"] = self._moves() - moves
        return row | ({"router_cores": round(cores, 3)} if pid is not None else {})

    def _first_tokens_s(self, session: BenchSession) -> list[float]:
        """Returns the time to the first token of requests, each of which is alone."""
        num_singles = min(MAX_SINGLES, self._args.num_requests)
        adapters = _adapters_in_turn(self._args.num_adapters, num_singles)
        trace = [TraceRequest(a, PROMPT_LEN, SHORT_ANSWER) for a in adapters]
        session.num_runs += 1
        prompts = make_prompts(trace, session.engine.info.vocab_size, run=session.num_runs)
        params = SamplingParams(
            temperature=0.0, max_tokens=SHORT_ANSWER, ignore_eos=True, detokenize=False
        )
        times = []
        for prompt, adapter in zip(prompts, adapters, strict=True):
            name = None if adapter is None else session.adapters[adapter][0]
            start, first = time.perf_counter(), None
            for _ in session.engine.client.generate(prompt, params, adapter=name):
                first = first or time.perf_counter()
            assert first is not None
            times.append(first - start)
        return times

    def _moves(self) -> int:
        return int(self._router.engine.client.stats()["router"]["moves"])

    def _write(self, case: str, row: Row) -> None:
        row = {"case": case, "engines": self._num_engines} | row
        self._table.add(row)
        args = self._args
        trace = {
            "num_adapters": args.num_adapters,
            "popularity": args.popularity,
            "alpha": args.alpha,
            "lengths": args.lengths,
        }
        self._router.write({"bench": "cluster", **trace, **row})


def _adapters_in_turn(num_adapters: int, num_requests: int) -> list[int | None]:
    return [i % num_adapters if num_adapters else None for i in range(num_requests)]


def _cpu_seconds(pid: int | None) -> float:
    """Returns the time on a processor that a process has taken, user and system; 0 for None."""
    if pid is None:
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system = fields[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
