"""Measures several engines behind one router beside one engine, and the cost of the router.

All figures come from one set of engines, which are child processes: the router's from its
endpoint, a single engine's from the endpoint of its own frontend. Then one engine is killed under
load: do all streams end complete, and how long do they pause?

    python benchmarks/cluster.py --model llama-2-7b --engines 2 --num-adapters 200 --out out.jsonl
"""

import argparse
import json
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from loraplex.engine.cluster.engine_cluster import EngineCluster
from loraplex.engine.cluster.launch.launchers import NO_RAY
from loraplex.engine.config import AdapterConfig, EngineConfig, MemoryConfig, ModelConfig
from loraplex.entrypoints.bench import dummy
from loraplex.entrypoints.bench.measure import LoadGenerator, Timeline, check_complete
from loraplex.entrypoints.bench.results import Results
from loraplex.entrypoints.bench.traces import TraceRequest, make_prompts, make_trace
from loraplex.entrypoints.client.sync_client import Client

MODULES = ("q", "k", "v", "o")
SINGLES = 200  # requests sent one by one
SHORT, LONG = (32, 8), (32, 1024)  # tokens of prompt and answer


@dataclass
class Bench:
    """A started cluster, the names of its adapters and the size of its vocabulary."""

    cluster: EngineCluster
    names: Sequence[str]
    vocab_size: int
    num_runs: int = 0

    def run(self, endpoint: str, trace: Sequence[TraceRequest], title: str) -> list[Timeline]:
        """Send a trace; fails unless every answer is complete."""
        self.num_runs += 1
        prompts = make_prompts(trace, self.vocab_size, run=self.num_runs)
        with Client(endpoint) as client:
            load = LoadGenerator(client, self.names, detokenize=False, max_open=1 << 14)
            timelines = load.run(trace, prompts, title=title)
        check_complete(timelines, trace)
        return timelines

    def first_token_ms(self, endpoint: str) -> float:
        """Median first token of requests that are alone."""
        times = []
        for i in range(SINGLES):
            request = TraceRequest(i % len(self.names), *SHORT)
            (timeline,) = self.run(endpoint, [request], "one by one")
            times.append(timeline.ttft_s)
        return round(1e3 * statistics.median(times), 3)

    def tokens_per_s(self, endpoint: str, num_requests: int) -> tuple[float, float]:
        """New tokens a second of a closed trace, and the router's share of one core."""
        trace = make_trace(num_requests, len(self.names))
        router = psutil.Process(self.cluster.router_pid)
        before, start = sum(router.cpu_times()[:2]), time.perf_counter()
        self.run(endpoint, trace, f"{num_requests} at once")
        seconds = time.perf_counter() - start
        num_tokens = sum(request.num_new_tokens for request in trace)
        return num_tokens / seconds, (sum(router.cpu_times()[:2]) - before) / seconds

    def kill_one(self, num_streams: int) -> dict[str, Any]:
        """Kill an engine while all streams run; returns their longest pauses."""
        trace = [TraceRequest(i % len(self.names), *LONG) for i in range(num_streams)]
        victim = next(iter(self.cluster.engines.values())).pids["scheduler"]
        timer = threading.Timer(2.0, os.kill, (victim, signal.SIGKILL))
        timer.start()
        timelines = self.run(self.cluster.endpoint, trace, "one engine is killed")
        timer.cancel()
        pauses = sorted(max(t.gaps_s(), default=0.0) for t in timelines)
        with Client(self.cluster.endpoint) as client:
            moves = client.stats()["router"]["moves"]
        return {
            "streams": num_streams,
            "moved": moves,
            "longest_pause_p50_s": round(statistics.median(pauses), 3),
            "longest_pause_s": round(pauses[-1], 3),
        }


def measure(bench: Bench, num_requests: int) -> dict[str, Any]:
    """Returns the figures; the engines are warm after the first of each."""
    cluster = bench.cluster
    direct = next(iter(cluster.engines.values())).endpoint
    num_engines = len(cluster.engines)
    for engine in cluster.engines.values():
        bench.tokens_per_s(engine.endpoint, num_requests)
    alone, _ = bench.tokens_per_s(direct, num_requests)
    together, router_cores = bench.tokens_per_s(cluster.endpoint, num_requests * num_engines)
    return {
        "first_token_direct_ms": bench.first_token_ms(direct),
        "first_token_routed_ms": bench.first_token_ms(cluster.endpoint),
        "one_engine_tokens_per_s": round(alone),
        "all_engines_tokens_per_s": round(together),
        "of_linear": round(together / alone / num_engines, 3),
        "router_cores": round(router_cores, 3),
    } | bench.kill_one(32 * num_engines)


def configure(args: argparse.Namespace, folder: Path) -> EngineConfig:
    """Returns the engines' configuration, with random adapters in `folder`."""
    model = ModelConfig(model=args.model, device=args.device)
    if args.model in dummy.MODELS:
        path = str(dummy.write_model(folder / args.model, args.model))
        model = replace(model, model=path, load_format="dummy")
    writer = dummy.AdapterWriter(
        dummy.read_config(model.model),
        ranks=(args.rank,),
        modules=MODULES,
        num_weight_files=min(16, args.num_adapters),
    )
    pairs = tuple(
        (f"a{i}", str(writer.write(folder / f"a{i}", i))) for i in range(args.num_adapters)
    )
    config = EngineConfig(
        model=replace(model, skip_tokenizer_init=True),
        adapter=AdapterConfig(adapters=pairs),
        memory=MemoryConfig(num_pages=args.num_pages),
    )
    server = replace(config.server, endpoint="", max_client_backlog=1 << 18)
    return replace(config, server=server)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="a folder, or a name of random weights")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--placement", default="affinity")
    parser.add_argument("--num-adapters", type=int, default=200)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--num-pages", type=int)
    parser.add_argument("--requests", type=int, default=500, help="for each engine")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = Results(args.out, None, lambda rows: [])
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as folder:
        config = configure(args, Path(folder))
        cluster = EngineCluster(
            config, num_engines=args.engines, placement=args.placement, ray_address=NO_RAY
        )
        cluster.start()
        with cluster:
            info = next(iter(cluster.engines.values())).info
            names = [name for name, _ in config.adapter.adapters]
            figures = measure(Bench(cluster, names, info.vocab_size), args.requests)
            row = {
                "benchmark": "benchmarks/cluster.py",
                "model": args.model,
                "device": info.workers[0].device,
                "engines": args.engines,
                "placement": args.placement,
                "num_adapters": args.num_adapters,
                "rank": args.rank,
                "requests_for_each_engine": args.requests,
            } | figures
    print(json.dumps(row, indent=1))
    results.write(row)


if __name__ == "__main__":
    main()
