"""Compares decode steps of DoRA with those of LoRA, and the loads of both.

One engine holds random adapters of both kinds. A batch decodes with each kind, all rows with one
adapter and each row with its own, and without adapters. The first token of a request whose adapter
is new shows what the norms of DoRA add to a load.

    python benchmarks/dora.py --model llama-3-8b
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError
from loraplex.entrypoints.bench import dummy
from loraplex.entrypoints.bench.measure import check_complete, medians, step_times, summarize
from loraplex.entrypoints.bench.names import BASE, MODULES
from loraplex.entrypoints.bench.panels import latency_panels
from loraplex.entrypoints.bench.results import Results, Row, Table
from loraplex.entrypoints.bench.session import BenchSession, open_session
from loraplex.entrypoints.bench.setup import RandomAdapters
from loraplex.entrypoints.bench.traces import TraceRequest, closed_batch
from loraplex.entrypoints.cli.bench_flags import (
    adapter_flags,
    add_flag,
    make_script_parser,
    repeats_flag,
)
from loraplex.entrypoints.cli.command import run_command
from loraplex.entrypoints.cli.flag_types import positive_int

DESCRIPTION = "Time decode steps and loads of DoRA beside those of LoRA."
KINDS = ("lora", "dora")
POPULARITIES = ("identical", "distinct")


def run(args: argparse.Namespace, config: EngineConfig) -> int:
    """Time each kind and popularity in one engine."""
    if config.adapter.adapters or config.adapter.adapter_dir:
        raise ConfigError("this benchmark writes its own adapters: name none")
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as folder:
        config = _with_adapters(args, config, Path(folder))
        random = RandomAdapters(args.ranks, args.lora_modules, args.weight_files)
        results = Results(args.out, args.plot, latency_panels)
        num_adapters = len(KINDS) * (args.batch + args.repeats)
        with open_session(config, num_adapters, random=random, results=results) as session:
            setup = {"bench": "dora", "ranks": list(args.ranks),
                     "lora_modules": list(args.lora_modules), "prompt_len": args.prompt_len,
                     "answer_len": args.answer_len, "repeats": args.repeats}  # fmt: skip
            table = Table(
                batch=6, kind=-6, popularity=-10, step_ms=9, step_ms_p99=11, ttft_ms_p50=11,
                over_lora=9,
            )  # fmt: skip
            rows: dict[str, Row] = {}
            for kind, popularity in [("", BASE), *((k, p) for p in POPULARITIES for k in KINDS)]:
                row = _step_row(args, session, kind, popularity)
                other = rows.get(popularity)
                if other is not None:
                    row["over_lora"] = round(row["step_ms"] / other["step_ms"], 4)
                rows.setdefault(popularity, row)
                table.add(row)
                session.write({**setup, **row})
            for kind in KINDS:
                row = _first_token_row(args, session, kind)
                table.add(row)
                session.write({**setup, **row})
    return 0


def _with_adapters(args: argparse.Namespace, config: EngineConfig, folder: Path) -> EngineConfig:
    """Write `batch` adapters of each kind, then `repeats` more of each that are loaded alone."""
    name = config.model.model
    is_known = name in dummy.MODELS and not Path(name).exists()
    model = dummy.model_config(name) if is_known else dummy.read_config(name)
    pairs: list[tuple[str, str]] = []
    for kind in KINDS:
        writer = dummy.AdapterWriter(
            model, ranks=args.ranks, modules=args.lora_modules,
            num_weight_files=args.weight_files, use_dora=kind == "dora",
        )  # fmt: skip
        for index in range(args.batch + args.repeats):
            path = writer.write(folder / f"{kind}{index}", index)
            pairs.append((f"{kind}{index}", str(path)))
    return replace(config, adapter=replace(config.adapter, adapters=tuple(pairs)))


def _first(args: argparse.Namespace, kind: str) -> int:
    """Returns the number of the first adapter of a kind."""
    return KINDS.index(kind) * (args.batch + args.repeats) if kind else 0


def _step_row(args: argparse.Namespace, session: BenchSession, kind: str, popularity: str) -> Row:
    first = _first(args, kind)
    trace = [
        replace(request, adapter=None if request.adapter is None else first + request.adapter)
        for request in closed_batch(
            args.batch,
            None if popularity == BASE else popularity,
            num_prompt_tokens=args.prompt_len,
            num_new_tokens=args.answer_len,
        )
    ]
    session.warm_up(trace)
    rows = []
    for _ in range(args.repeats):
        timelines = session.measure(trace, title=f"{kind} {popularity}")
        check_complete(timelines, trace)
        rows.append({**step_times(timelines), **summarize(timelines)})
    runs = {"step_ms_of_runs": [row.get("step_ms") for row in rows]}
    return {"batch": args.batch, "kind": kind, "popularity": popularity, **runs, **medians(rows)}


def _first_token_row(args: argparse.Namespace, session: BenchSession, kind: str) -> Row:
    """Time the first token of single requests, each with an adapter that was never used."""
    rows = []
    for index in range(args.repeats):
        trace = [TraceRequest(_first(args, kind) + args.batch + index, args.prompt_len, 2)]
        rows.append(summarize(session.measure(trace, title=f"{kind} new")))
    return {"batch": 1, "kind": kind, "popularity": "new", **medians(rows)}


def _add_flags(group: Any) -> None:
    adapter_flags(group, ranks=[16], modules=list(MODULES))
    add_flag(group, "--batch", positive_int, 64, "N", "requests that decode together")
    add_flag(group, "--prompt-len", positive_int, 128, "N", "tokens of every prompt")
    add_flag(group, "--answer-len", positive_int, 128, "N", "tokens of every answer")
    repeats_flag(group, 3)


def make_parser() -> argparse.ArgumentParser:
    return make_script_parser(DESCRIPTION, _add_flags, run)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
