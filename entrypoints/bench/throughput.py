"""`loraplex bench throughput`: a closed trace, by the base model and by n adapters."""

import argparse

from loraplex.engine.config import EngineConfig
from loraplex.entrypoints.bench.measure import check_complete, medians, summarize
from loraplex.entrypoints.bench.panels import throughput_panels
from loraplex.entrypoints.bench.results import Results, Row, Table
from loraplex.entrypoints.bench.session import BenchSession, open_session
from loraplex.entrypoints.bench.setup import RandomAdapters
from loraplex.entrypoints.bench.traces import TraceRequest, make_trace

_COUNTERS = ("num_steps", "num_preemptions", "num_adapter_loads")


def run(args: argparse.Namespace, config: EngineConfig) -> int:
    """Measure each number of adapters.

    All requests are sent at once; the engine runs at most --max-num-seqs of them at a time.
    """
    random = RandomAdapters(args.ranks, args.lora_modules, args.weight_files)
    results = Results(args.out, args.plot, throughput_panels)
    with open_session(config, max(args.num_adapters), random=random, results=results) as session:
        table = Table(
            num_adapters=12, new_tokens_per_s=16, of_base=8, requests_per_s=14, ttft_ms_p50=11,
            ttft_ms_p99=11, inter_token_ms_p50=18, inter_token_ms_p99=18, gpu_idle_share=14,
        )  # fmt: skip
        base_rate = None
        for num_adapters in args.num_adapters:
            trace = make_trace(
                args.num_requests,
                num_adapters,
                popularity=args.popularity,
                alpha=args.alpha,
                lengths=args.lengths,
            )
            session.warm_up(trace)
            row = _measure(session, trace, args.repeats, f"{num_adapters} adapters")
            if num_adapters == 0:
                base_rate = row["new_tokens_per_s"]
            if base_rate:
                row["of_base"] = round(row["new_tokens_per_s"] / base_rate, 4)
            row = {"num_adapters": num_adapters, **row}
            table.add(row)
            session.write({"bench": "throughput", **_case(args), **row})
    return 0


def _measure(session: BenchSession, trace: list[TraceRequest], repeats: int, title: str) -> Row:
    """Medians over `repeats` runs, and the rate of each run."""
    rows = []
    for _ in range(repeats):
        before = session.counters()
        timelines = session.measure(trace, title=title)
        check_complete(timelines, trace)
        after = session.counters()
        counted = {name: after[name] - before[name] for name in _COUNTERS}
        idle = session.idle_share(before, after)
        rows.append({**summarize(timelines), **counted, "gpu_idle_share": idle})
    rates = [row["new_tokens_per_s"] for row in rows]
    return {**medians(rows), "new_tokens_per_s_of_runs": rates}


def _case(args: argparse.Namespace) -> Row:
    return {
        "num_requests": args.num_requests,
        "popularity": args.popularity,
        "alpha": args.alpha,
        "lengths": args.lengths,
        "repeats": args.repeats,
    }
