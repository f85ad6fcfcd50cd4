"""Measures Punica's closed batch (arXiv 2310.18547) in its four popularities of adapters."""

import argparse
from dataclasses import replace

from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError
from loraplex.entrypoints.bench.measure import check_complete, medians, summarize
from loraplex.entrypoints.bench.names import BASE, MODELS
from loraplex.entrypoints.bench.papers import PUNICA, PUNICA_BASE, PUNICA_NOTE
from loraplex.entrypoints.bench.results import Results, Row, Table
from loraplex.entrypoints.bench.session import BenchSession, RandomAdapters, open_session
from loraplex.entrypoints.bench.traces import TraceRequest, adapters_of_rows, punica_trace

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
    results = Results(args.out)
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
