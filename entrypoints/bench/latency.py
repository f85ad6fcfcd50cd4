"""`loraplex bench latency`: time of a step, by batch size and popularity of adapters."""

import argparse

from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError
from loraplex.entrypoints.bench.measure import check_complete, medians, step_times, summarize
from loraplex.entrypoints.bench.names import BASE
from loraplex.entrypoints.bench.panels import latency_panels
from loraplex.entrypoints.bench.results import Results, Table
from loraplex.entrypoints.bench.session import open_session
from loraplex.entrypoints.bench.setup import RandomAdapters
from loraplex.entrypoints.bench.traces import adapters_of_rows, closed_batch


def run(args: argparse.Namespace, config: EngineConfig) -> int:
    """Send each batch at once, and time a step while all of its requests decode."""
    limit = config.scheduler.max_num_seqs
    if max(args.batches) > limit:
        raise ConfigError(
            f"--batches: {max(args.batches)} requests exceed --max-num-seqs, which is {limit}"
        )
    random = RandomAdapters(args.ranks, args.lora_modules, args.weight_files)
    results = Results(args.out, args.plot, latency_panels)
    with open_session(config, _num_adapters(args), random=random, results=results) as session:
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
