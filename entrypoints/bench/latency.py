"""`loraplex bench latency`: step time by batch and popularity."""

import argparse

from loraplex.engine.errors import ConfigError
from loraplex.entrypoints.bench.measure import check_complete, medians, step_times, summarize
from loraplex.entrypoints.bench.names import BASE
from loraplex.entrypoints.bench.results import Table
from loraplex.entrypoints.bench.session import open_session
from loraplex.entrypoints.bench.traces import adapters_of_rows, closed_batch


def run(args: argparse.Namespace) -> int:
    """B requests are sent at once; a step is timed while all B decode."""
    with open_session(args, _num_adapters(args)) as session:
        limit = session.config.scheduler.max_num_seqs
        if max(args.batches) > limit:
            raise ConfigError(f"--batches: {max(args.batches)} needs --max-num-seqs, now {limit}")
        table = Table(
            batch=6, popularity=-10, num_adapters=12, step_ms=9, step_ms_mean=12, step_ms_p99=11,
            ttft_ms_p50=11, new_tokens_per_s=16, gpu_idle_share=14,
        )  # fmt: skip
        for batch in args.batches:
            for popularity in args.popularity:
                trace = closed_batch(
                    batch,
                    None if popularity == BASE else popularity,
                    num_prompt_tokens=args.prompt_len,
                    num_new_tokens=args.answer_len,
                )
                session.warm_up(trace)
                rows = []
                for _ in range(args.repeats):
                    before = session.counters()
                    timelines = session.measure(trace, title=f"{batch} {popularity}")
                    check_complete(timelines, trace)
                    idle = session.idle_share(before, session.counters())
                    measured = {**step_times(timelines), **summarize(timelines)}
                    rows.append({**measured, "gpu_idle_share": idle})
                row = {
                    "batch": batch,
                    "popularity": popularity,
                    "num_adapters": len({r.adapter for r in trace} - {None}),
                    **medians(rows),
                }
                table.add(row)
                case = {
                    "prompt_len": args.prompt_len,
                    "answer_len": args.answer_len,
                    "repeats": args.repeats,
                    "step_ms_of_runs": [r.get("step_ms") for r in rows],
                }
                session.write({"bench": "latency", **case, **row})
    return 0


def _num_adapters(args: argparse.Namespace) -> int:
    batch = max(args.batches)
    names = [name for name in args.popularity if name != BASE]
    return max((max(adapters_of_rows(name, batch, batch)) + 1 for name in names), default=0)
