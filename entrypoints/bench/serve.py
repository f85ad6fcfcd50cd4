"""`loraplex bench serve`: requests that arrive at a given rate."""

import argparse
import math
import sys

from loraplex.engine.config import EngineConfig
from loraplex.entrypoints.bench.measure import summarize_open_loop
from loraplex.entrypoints.bench.panels import serve_panels
from loraplex.entrypoints.bench.results import Results, Row, Table
from loraplex.entrypoints.bench.session import open_session
from loraplex.entrypoints.bench.setup import RandomAdapters
from loraplex.entrypoints.bench.traces import make_trace


def run(args: argparse.Namespace, config: EngineConfig) -> int:
    """Measure each rate in an open loop: requests are sent when due, even if earlier ones wait."""
    random = RandomAdapters(args.ranks, args.lora_modules, args.weight_files)
    results = Results(args.out, args.plot, serve_panels)
    with open_session(config, args.num_adapters, random=random, results=results) as session:
        table = Table(
            rate=8, num_requests=12, num_failed=10, requests_per_s=14, new_tokens_per_s=16,
            ttft_ms_p50=11, ttft_ms_p99=11, inter_token_ms_p50=18, inter_token_ms_p99=18,
            attainment=10,
        )  # fmt: skip
        for rate in args.rates:
            trace = make_trace(
                math.ceil(rate * args.duration),
                args.num_adapters,
                popularity=args.popularity,
                alpha=args.alpha,
                lengths=args.lengths,
                rate=rate,
                cv=args.cv,
            )
            session.warm_up(trace)
            timelines = session.measure(trace, title=f"{rate:g} requests/s")
            row = {
                "rate": rate,
                "num_requests": len(trace),
                **summarize_open_loop(timelines, args.ttft_objective),
            }
            table.add(row)
            if row["num_failed"]:
                print(f"first failure: {row['first_failure']}", file=sys.stderr)
            session.write({"bench": "serve", **_case(args), **row})
    return 0


def _case(args: argparse.Namespace) -> Row:
    return {
        "num_adapters": args.num_adapters,
        "popularity": args.popularity,
        "alpha": args.alpha,
        "lengths": args.lengths,
        "cv": args.cv,
        "duration_s": args.duration,
        "ttft_objective_s": args.ttft_objective,
    }
