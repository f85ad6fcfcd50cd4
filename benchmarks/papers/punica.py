"""Measures Punica's closed batch (arXiv 2310.18547) in its four popularities of adapters.

python benchmarks/papers/punica.py --adapter-host-bytes 12G
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError
from loraplex.entrypoints.bench.measure import check_complete, medians, summarize
from loraplex.entrypoints.bench.names import BASE, MODELS, MODULES, POPULARITIES
from loraplex.entrypoints.bench.results import Results, Row, Table
from loraplex.entrypoints.bench.session import BenchSession, open_session
from loraplex.entrypoints.bench.setup import RandomAdapters
from loraplex.entrypoints.bench.traces import SEED, TraceRequest, adapters_of_rows
from loraplex.entrypoints.cli.bench_flags import (
    adapter_flags,
    add_flag,
    make_script_parser,
    repeats_flag,
)
from loraplex.entrypoints.cli.command import run_command
from loraplex.entrypoints.cli.flag_types import list_of, one_of, positive_int

from paper_panels import punica_panels
from published_figures import PUNICA, PUNICA_BASE, PUNICA_NOTE

DESCRIPTION = "Measure Punica's closed batch in its four popularities of adapters."
MAX_PROMPT, MAX_ANSWER = 255, 768

IDENTICAL = "identical"
_COUNTERS = ("num_steps", "num_preemptions", "num_adapter_loads")


def run(args: argparse.Namespace, config: EngineConfig) -> int:
    """Measure each popularity, with an engine for each batch size.

    All requests are sent at once; the engine runs at most a batch of them at a time, first come,
    first served.
    """
    if not config.model.model:
        config = replace(config, model=replace(config.model, model=next(iter(MODELS))))
    if hasattr(args, "max_num_seqs"):
        raise ConfigError("--max-num-seqs is set by this benchmark: give --batches instead")
    names = [name for name in args.popularity if name != BASE]
    num_rows = args.num_requests
    num_adapters = max((max(adapters_of_rows(p, num_rows, num_rows)) + 1 for p in names), default=0)
    results = Results(args.out, args.plot, punica_panels)
    table = Table(
        batch=6, popularity=-10, num_adapters=12, new_tokens_per_s=16, all_tokens_per_s=16,
        of_identical=12, paper_tokens_per_s=18, requests_per_s=14, inter_token_ms_p50=18,
        inter_token_ms_p99=18, gpu_idle_share=14, num_adapter_loads=17,
    )  # fmt: skip
    random = RandomAdapters(args.ranks, args.lora_modules, args.weight_files)
    for batch in args.batches:
        config = replace(config, scheduler=replace(config.scheduler, max_num_seqs=batch))
        with open_session(config, num_adapters, random=random, results=results) as session:
            _run_batch(args, session, table, batch)
    print(PUNICA_NOTE)
    return 0


def _run_batch(args: argparse.Namespace, session: BenchSession, table: Table, batch: int) -> None:
    identical_rate = None
    for popularity in sorted(args.popularity, key=lambda name: name != IDENTICAL):
        trace = punica_trace(args.num_requests, None if popularity == BASE else popularity)
        session.warm_up(trace)
        title = f"batch {batch}, {popularity}"
        rows = [_measure(session, trace, title) for _ in range(args.repeats)]
        row = {
            "bench": "punica",
            "batch": batch,
            "popularity": popularity,
            "num_adapters": len({request.adapter for request in trace} - {None}),
            "num_requests": len(trace),
            "num_prompt_tokens": sum(request.num_prompt_tokens for request in trace),
            "repeats": args.repeats,
            **medians(rows),
            "new_tokens_per_s_of_runs": [r["new_tokens_per_s"] for r in rows],
        }
        if popularity == IDENTICAL:
            identical_rate = row["new_tokens_per_s"]
        if identical_rate:
            row["of_identical"] = round(row["new_tokens_per_s"] / identical_rate, 4)
        published = PUNICA_BASE if popularity == BASE else PUNICA
        model = session.setup["model"]
        if model in published and batch == 32:
            row |= {"paper_tokens_per_s": published[model], "paper": PUNICA_NOTE}
        table.add(row)
        session.write(row)


def _measure(session: BenchSession, trace: list[TraceRequest], title: str) -> Row:
    before = session.counters()
    timelines = session.measure(trace, title=title)
    check_complete(timelines, trace)
    after = session.counters()
    row: Row = summarize(timelines)
    num_tokens = row["new_tokens"] + sum(request.num_prompt_tokens for request in trace)
    return {
        **row,
        "all_tokens_per_s": round(num_tokens / row["seconds"], 2),
        **{name: after[name] - before[name] for name in _COUNTERS},
        "gpu_idle_share": session.idle_share(before, after),
    }


def punica_trace(num_requests: int, popularity: str | None) -> list[TraceRequest]:
    """Make Punica's closed batch (arXiv 2310.18547). A popularity of None is the base model.

    The paper takes lengths from ShareGPT, which this project may not ship, and says that 1,000
    requests generate about 101k tokens. Here prompts are log-normal as in the authors' published
    benchmark (sigma 0.8, scale 18, shifted by -1). Answers are log-normal with the same sigma and
    a mean of 101 tokens. Lengths do not depend on the popularity.
    """
    length_rng, adapter_rng = (
        np.random.default_rng(child) for child in np.random.SeedSequence(SEED).spawn(2)
    )
    prompts = length_rng.lognormal(math.log(18.0), 0.8, num_requests) - 1
    answers = length_rng.lognormal(math.log(101.0) - 0.8**2 / 2, 0.8, num_requests)
    adapters: Sequence[int | None] = [None] * num_requests
    if popularity is not None:
        dealt = adapters_of_rows(popularity, num_requests, num_requests)
        adapters = adapter_rng.permutation(dealt).tolist()
    columns = zip(
        adapters,
        prompts.round().clip(1, MAX_PROMPT).astype(int).tolist(),
        answers.round().clip(1, MAX_ANSWER).astype(int).tolist(),
        strict=True,
    )
    return [TraceRequest(*fields) for fields in columns]


def _add_flags(group: Any) -> None:
    adapter_flags(group, ranks=[16], modules=list(MODULES))
    add_flag(group, "--num-requests", positive_int, 1024, "N", "requests of a run")
    add_flag(group, "--batches", list_of(positive_int), [32], "N,..",
             "requests that run at one time; each starts an engine")  # fmt: skip
    add_flag(group, "--popularity", list_of(one_of(BASE, *POPULARITIES)), list(POPULARITIES),
             "NAME,..", f"who answers: {BASE}, {', '.join(POPULARITIES)}")  # fmt: skip
    repeats_flag(group, 1)


def make_parser() -> argparse.ArgumentParser:
    return make_script_parser(DESCRIPTION, _add_flags, run)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
