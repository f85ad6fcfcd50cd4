"""Measures S-LoRA's settings (arXiv 2311.03285): thousands of adapters, saturated or at a rate.

python benchmarks/papers/slora.py --setting S1 --num-adapters 0,5,100 --rates inf,10
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from loraplex.engine.config import EngineConfig
from loraplex.entrypoints.bench.measure import check_complete, medians, summarize_open_loop
from loraplex.entrypoints.bench.results import Results, Row, Table
from loraplex.entrypoints.bench.session import BenchSession, open_session
from loraplex.entrypoints.bench.setup import RandomAdapters
from loraplex.entrypoints.bench.traces import TraceRequest, make_trace
from loraplex.entrypoints.cli.bench_flags import (
    adapter_flags,
    add_flag,
    cv_flag,
    lengths_flag,
    make_script_parser,
    objective_flag,
    repeats_flag,
)
from loraplex.entrypoints.cli.command import run_command
from loraplex.entrypoints.cli.flag_types import (
    list_of,
    natural,
    one_of,
    parse_rate,
    positive,
    positive_int,
)

from paper_panels import slora_panels
from published_figures import SETTINGS, SLORA, SLORA_NOTE, SLORA_RANKS, SLORA_RANKS_NOTE

DESCRIPTION = "Measure S-LoRA's settings: thousands of adapters, saturated or at a rate."

_COUNTERS = ("num_steps", "num_preemptions", "num_adapter_loads")


def run(args: argparse.Namespace, config: EngineConfig) -> int:
    """Measure each number of adapters at each rate.

    The base model goes first, because the others are compared with it.
    """
    model, ranks = SETTINGS[args.setting]
    if not config.model.model:
        config = replace(config, model=replace(config.model, model=model))
    counts = sorted(args.num_adapters, key=lambda count: count > 0)
    with open_session(
        config,
        max(*counts, args.num_registered or 0),
        random=RandomAdapters(args.ranks or list(ranks), args.lora_modules, args.weight_files),
        results=Results(args.out, args.plot, slora_panels),
    ) as session:
        table = Table(
            load=-12, num_adapters=12, new_tokens_per_s=16, of_base=8, requests_per_s=14,
            paper_requests_per_s=20, paper_of_base=13, ttft_ms_mean=13, ttft_ms_p50=12,
            ttft_ms_p99=12, attainment=10, gpu_idle_share=14, num_adapter_loads=17,
        )  # fmt: skip
        base_rates: dict[float, float] = {}
        for num_adapters in counts:
            for rate in args.rates:
                trace = _trace(args, num_adapters, rate)
                session.warm_up(trace)
                row = _describe(args, session, num_adapters, rate, trace)
                row |= _measure(session, trace, args, f"{row['load']}, {num_adapters} adapters")
                if num_adapters == 0:
                    base_rates[rate] = row["new_tokens_per_s"]
                if base_rates.get(rate):
                    row["of_base"] = round(row["new_tokens_per_s"] / base_rates[rate], 4)
                table.add(row)
                session.write(row)
    print(SLORA_NOTE if args.setting in SLORA else SLORA_RANKS_NOTE)
    return 0


def _trace(args: argparse.Namespace, num_adapters: int, rate: float) -> list[TraceRequest]:
    is_open = math.isfinite(rate)
    return make_trace(
        math.ceil(rate * args.duration) if is_open else args.num_requests,
        num_adapters,
        alpha=args.alpha,
        lengths=args.lengths,
        rate=rate if is_open else None,
        cv=args.cv,
    )


def _measure(
    session: BenchSession, trace: list[TraceRequest], args: argparse.Namespace, title: str
) -> Row:
    """Medians over the repeated runs, and the rate of each run.

    Raises:
        LoraplexError: a request of a saturated run failed or got too few tokens.
    """
    rows = []
    for _ in range(args.repeats):
        before = session.counters()
        timelines = session.measure(trace, title=title)
        if trace[-1].arrival_s == 0:
            check_complete(timelines, trace)
        after = session.counters()
        counted = {name: after[name] - before[name] for name in _COUNTERS}
        idle = session.idle_share(before, after)
        figures = summarize_open_loop(timelines, args.ttft_objective)
        rows.append({**figures, **counted, "gpu_idle_share": idle})
    failure = next((row.pop("first_failure") for row in rows if row["num_failed"]), None)
    numbers = [{k: v for k, v in row.items() if k != "first_failure"} for row in rows]
    rates = [row["new_tokens_per_s"] for row in rows]
    return {**medians(numbers), "first_failure": failure, "new_tokens_per_s_of_runs": rates}


def _describe(
    args: argparse.Namespace,
    session: BenchSession,
    num_adapters: int,
    rate: float,
    trace: list[TraceRequest],
) -> Row:
    """Fields that describe the case, and the paper's figures for it."""
    is_open = math.isfinite(rate)
    row = {
        "bench": "slora",
        "setting": args.setting,
        "load": f"{rate:g}/s, cv {args.cv:g}" if is_open else "saturated",
        "rate": rate if is_open else None,
        "cv": args.cv if is_open else None,
        "num_adapters": num_adapters,
        "num_registered": len(session.adapters),
        "num_used": len({request.adapter for request in trace} - {None}),
        "num_requests": len(trace),
        "alpha": args.alpha,
        "lengths": args.lengths,
        "repeats": args.repeats,
        "ttft_objective_s": args.ttft_objective,
    }
    if session.setup["model"] == SETTINGS[args.setting][0]:
        num_gpus = session.setup["tensor_parallel_size"]
        row |= paper_figures(args.setting, num_adapters, num_gpus)
    return row


def paper_figures(setting: str, num_adapters: int, num_gpus: int) -> Row:
    """Returns the paper's figures for a case, as fields that begin with `paper`; {} for none."""
    figure = SLORA.get(setting, {}).get(num_adapters)
    if figure is not None:
        return {**{f"paper_{k}": v for k, v in figure._asdict().items()}, "paper": SLORA_NOTE}
    bars = SLORA_RANKS.get((setting, num_adapters, num_gpus))
    if bars is None:
        return {}
    return {
        "paper_requests_per_s": bars.requests_per_s,
        "paper_of_base": round(bars.requests_per_s / bars.base_requests_per_s, 4),
        "paper": SLORA_RANKS_NOTE,
    }


def _add_flags(group: Any) -> None:
    settings = (f"{name}: {model}, ranks {','.join(map(str, ranks))}"
                for name, (model, ranks) in SETTINGS.items())  # fmt: skip
    add_flag(group, "--setting", one_of(*SETTINGS), "S1", "NAME",
             f"{'; '.join(settings)}; --model and --ranks replace these")  # fmt: skip
    adapter_flags(group, ranks=None)
    add_flag(group, "--num-adapters", list_of(natural), [5, 100, 1000, 2000], "N,..",
             "numbers of adapters, one run each; 0 is the base model alone")  # fmt: skip
    add_flag(group, "--num-registered", positive_int, None, "N",
             "adapters registered with the engine, if more than the trace uses")  # fmt: skip
    add_flag(group, "--rates", list_of(parse_rate), [math.inf], "X,..",
             "requests a second, one run each; inf sends all at once (saturated)")  # fmt: skip
    add_flag(group, "--num-requests", positive_int, 1200, "N", "requests of a saturated run")
    add_flag(group, "--duration", positive, 120.0, "SECONDS",
             "time over which the requests of a run at a rate arrive")  # fmt: skip
    cv_flag(group)
    add_flag(group, "--alpha", positive, 1.0, "X", "exponent of the popularity; 1 is uniform")
    lengths_flag(group)
    objective_flag(group)
    repeats_flag(group, 1)


def make_parser() -> argparse.ArgumentParser:
    return make_script_parser(DESCRIPTION, _add_flags, run)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
