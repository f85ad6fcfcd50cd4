"""Measures what it costs that an adapter is outside the pages, while a batch decodes.

One wave is one trace. A batch of long answers decodes, each with an adapter of its own. Short
requests, the probes, arrive while the whole batch decodes.

Waves of the first kind time the probes' first tokens, by where the probe's adapter is:

resident: in pages, because it was used a moment ago.
host:     in the host store. More adapters take turns than there are free slots.
disk:     registered again before the wave, so its files are read from the page cache, checked and
          packed. Its hash is known.
new:      never used. Its files are read as for `disk`, and its content is hashed too.

Waves of the second kind send probes at --load-rate and time the batch's tokens: without probes
(quiet), with probes for resident adapters (warm), and with probes whose adapters are loaded from
the host store (loads).

    python benchmarks/papers/tiers.py --model llama-3-8b
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError
from loraplex.entrypoints.bench.measure import percentiles
from loraplex.entrypoints.bench.names import MODULES
from loraplex.entrypoints.bench.results import Results, Row, Table
from loraplex.entrypoints.bench.session import open_session
from loraplex.entrypoints.bench.setup import RandomAdapters
from loraplex.entrypoints.cli.bench_flags import adapter_flags, add_flag, make_script_parser
from loraplex.entrypoints.cli.command import run_command
from loraplex.entrypoints.cli.flag_types import positive, positive_int

from paper_panels import tiers_panels
from tier_waves import CASES, NUM_DISK, Numbers, TierWaves, Window

DESCRIPTION = "Measure first tokens by the tier of the adapter, and what loads cost other requests."


def run(args: argparse.Namespace, config: EngineConfig) -> int:
    """Measure first tokens by tier, then the time between the batch's tokens."""
    if config.adapter.adapters or config.adapter.adapter_dir:
        raise ConfigError("this benchmark writes its own adapters: name none")
    if hasattr(args, "max_adapter_slots"):
        raise ConfigError("--max-adapter-slots is set by this benchmark: leave it out")
    if config.scheduler.max_num_seqs <= args.batch:
        raise ConfigError(f"--max-num-seqs must exceed --batch, {args.batch}")
    numbers = Numbers(args.batch, num_new=args.samples + NUM_DISK)
    memory = replace(config.memory, max_adapter_slots=numbers.num_slots)
    with open_session(
        replace(config, memory=memory),
        numbers.num_adapters,
        random=RandomAdapters(args.ranks, args.lora_modules, args.weight_files),
        results=Results(args.out, args.plot, tiers_panels),
        hold_all=not hasattr(args, "adapter_host_bytes"),
    ) as session:
        table = Table(
            part=-11, case=-8, num_samples=11, ttft_ms_p50=11, ttft_ms_p99=11,
            over_resident_ms=16, loads_per_s=11, inter_token_ms_p50=18, inter_token_ms_p99=18,
            p99_over_warm=13, p99_over_quiet=14,
        )  # fmt: skip
        waves = TierWaves(args, session, numbers)
        window = waves.warm_up().inner
        case = {"bench": "tiers", "batch": args.batch, "prompt_len": args.prompt_len,
                "answer_len": args.answer_len}  # fmt: skip
        for row in (*_tier_rows(waves, window), *_gap_rows(waves, window)):
            table.add(row)
            session.write({**case, **row})
    return 0


def _tier_rows(waves: TierWaves, window: Window) -> list[Row]:
    rows: list[Row] = []
    for tier, seconds in waves.first_tokens(window).items():
        row: Row = {"part": "ttft", "case": tier, "probe_rate": waves.args.probe_rate,
                    "num_samples": len(seconds), **percentiles("ttft_ms", seconds)}  # fmt: skip
        if rows and {"ttft_ms_p50"} <= row.keys() & rows[0].keys():
            row["over_resident_ms"] = round(row["ttft_ms_p50"] - rows[0]["ttft_ms_p50"], 3)
        rows.append(row)
    return rows


def _gap_rows(waves: TierWaves, window: Window) -> list[Row]:
    gaps: dict[str, list[float]] = {case: [] for case in CASES}
    rates: dict[str, list[float]] = {case: [] for case in CASES}
    for _ in range(waves.args.repeats):
        for case in CASES:
            found, loads_per_s = waves.case_wave(case, window)
            gaps[case] += found
            rates[case].append(loads_per_s)
    rows: list[Row] = []
    for case in CASES:
        row: Row = {"part": "inter_token", "case": case, "load_rate": waves.args.load_rate,
                    "repeats": waves.args.repeats, "num_samples": len(gaps[case]),
                    "loads_per_s": round(float(np.mean(rates[case])), 2),
                    **percentiles("inter_token_ms", gaps[case])}  # fmt: skip
        for other in rows:
            if "inter_token_ms_p99" in row.keys() & other.keys():
                rise = row["inter_token_ms_p99"] / other["inter_token_ms_p99"] - 1
                row[f"p99_over_{other['case']}"] = round(rise, 4)
        rows.append(row)
    return rows


def _add_flags(group: Any) -> None:
    adapter_flags(group, ranks=[16], modules=list(MODULES))
    add_flag(group, "--batch", positive_int, 64, "N", "requests that decode in the background")
    add_flag(group, "--prompt-len", positive_int, 128, "N", "tokens of every prompt")
    add_flag(group, "--answer-len", positive_int, 1024, "N", "tokens of a background answer")
    add_flag(group, "--samples", positive_int, 40, "N", "first tokens timed in each tier")
    add_flag(group, "--probe-rate", positive, 8.0, "X",
             "short requests a second while first tokens are timed")  # fmt: skip
    add_flag(group, "--load-rate", positive, 50.0, "X",
             "loads a second while background tokens are timed")  # fmt: skip
    add_flag(group, "--repeats", positive_int, 2, "N",
             "background batches timed in each case")  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    return make_script_parser(DESCRIPTION, _add_flags, run)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
