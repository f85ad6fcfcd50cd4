"""`loraplex bench serve`: requests at a rate, whether or not the engine keeps up."""

import argparse
import math
import sys

from loraplex.entrypoints.bench.measure import outcome
from loraplex.entrypoints.bench.results import Row, Table
from loraplex.entrypoints.bench.session import open_session
from loraplex.entrypoints.bench.traces import make_trace


def run(args: argparse.Namespace) -> int:
    """An open loop: a request goes out when it is due, through the ZeroMQ API."""
    with open_session(args, args.num_adapters) as session:
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
                **outcome(timelines, args.ttft_objective),
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
