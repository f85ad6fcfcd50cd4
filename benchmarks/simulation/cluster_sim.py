"""Simulates placement over a cluster: which policy loads least, answers soonest, needs least GPUs?

The placement, the schedulers, their queues, pages and adapters are real. The seconds come from the
cost model of Llama-2-7B on one H200 in modelled_worker.py. No GPU is used.

    python benchmarks/simulation/cluster_sim.py slora day --trace azure.csv --rate 160

runs the named parts and each trace file, some minutes each, and writes
benchmarks/results/cluster_sim.jsonl. Trace files are Azure's CSV or Mooncake's JSON lines; see
docs/results.md for where they come from.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loraplex.scheduler.config import SchedulerConfig
from loraplex.scheduler.placement.placement import POLICIES
from loraplex.scheduler.placement.scaling import ScalePolicy

from cluster_result import ClusterResult
from cluster_traces import Row, day_rows, press, read_rows, slora_rows, with_adapters
from modelled_cluster import ClusterSpec, ModelledCluster
from modelled_worker import CostModel

RESULTS = Path(__file__).parents[1] / "results"
NOTE = (
    "simulation: the real placement and schedulers, modelled workers (Llama-2-7B on H200s), "
    "virtual time"
)
NUM_ENGINES = 16
NUM_ADAPTERS = 10_000
ALPHA = 1.0
PAGES = (16, 8, 4, 2)  # ranks 64, 32, 16, 8 on q, k, v, o
NUM_PAGES = 13_000  # of 8 MiB: what an H200 leaves
OBJECTIVE_S = 6.0
COMPARED = ("affinity", "least_loaded", "random")
DAY_SECONDS, DAY_PEAK = 180.0, 420.0
START_S, HOLD_S = 2.0, 2.0  # 16 minutes of the pressed day


@dataclass(frozen=True)
class Case:
    """One run: a trace and a policy. `scaled` lets engines go and come."""

    part: str
    placement: str
    rows: Sequence[Row] = field(repr=False)
    rate: float
    seconds: float
    scaled: bool = False

    def run(self) -> ClusterResult:
        spec = ClusterSpec(
            NUM_ENGINES,
            self.placement,
            SchedulerConfig(),
            NUM_PAGES,
            lambda adapter: PAGES[adapter % len(PAGES)],
            OBJECTIVE_S,
            scale=self._scale if self.scaled else None,
            start_s=START_S,
        )
        return ModelledCluster(spec, with_adapters(list(self.rows), NUM_ADAPTERS, ALPHA)).run()

    def describe(self) -> dict[str, Any]:
        trace = {
            "rate": self.rate, "seconds": self.seconds, "num_adapters": NUM_ADAPTERS,
            "zipf_alpha": ALPHA,
        }  # fmt: skip
        scale = {"min": 1, "max": NUM_ENGINES, "start_s": START_S, "hold_s": HOLD_S}
        return {
            "benchmark": "benchmarks/simulation/cluster_sim.py",
            "simulation": NOTE,
            "part": self.part,
            "placement": self.placement,
            "scale": scale if self.scaled else None,
            "trace": trace,
            "num_engines": NUM_ENGINES,
            "num_pages": NUM_PAGES,
            "adapter_pages": PAGES,
            "objective_s": OBJECTIVE_S,
            "cost_model": asdict(CostModel()),
        }

    @staticmethod
    def _scale() -> ScalePolicy:
        return ScalePolicy(min_engines=1, max_engines=NUM_ENGINES, hold_s=HOLD_S)


def slora_cases(rates: Sequence[float], seconds: float) -> Iterator[Case]:
    for rate in rates:
        rows = slora_rows(rate, seconds)
        for placement in COMPARED:
            yield Case("slora", placement, rows, rate, seconds)


def day_cases() -> Iterator[Case]:
    rows = day_rows(DAY_PEAK, DAY_SECONDS)
    for placement, scaled in (("least_loaded", False), ("affinity", False), ("consolidate", True)):
        yield Case("day", placement, rows, DAY_PEAK, DAY_SECONDS, scaled)


def trace_cases(path: Path, rate: float, seconds: float) -> Iterator[Case]:
    rows = press(read_rows(path), rate, seconds)
    for placement in COMPARED:
        yield Case(path.stem, placement, rows, rate, seconds)


def show(case: Case, row: dict[str, Any]) -> None:
    print(
        f"{case.part:12} {case.rate:g}/s | {case.placement:12} | {row['new_tokens_per_s']:7} tok/s"
        f" | {row['attainment']:7.2%} in time, p50 {row['ttft_p50_s']:.3f} p99 "
        f"{row['ttft_p99_s']:.3f} s | {row['adapter_loads']} loads ({row['first_uses']} first "
        f"uses), {row['adapter_loads_second_half']} ({row['first_uses_second_half']}) in the second"
        f" half | {row['engine_seconds']} engine-s,"
        f" {row['moves']} moves, {row['recomputed_tokens']} tokens again",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Simulate placement over a cluster.")
    parser.add_argument("parts", nargs="*", metavar="{slora,day}", help="traces made here")
    parser.add_argument("--rates", type=float, nargs="+", default=[320.0, 480.0, 560.0],
                        help="slora: requests a second (default: %(default)s)")  # fmt: skip
    parser.add_argument("--trace", type=Path, help="a trace file, sped up to --rate")
    parser.add_argument("--rate", type=float, help="requests a second of the trace file")
    parser.add_argument("--seconds", type=float, default=60.0,
                        help="length of slora and trace file (default: %(default)s)")  # fmt: skip
    parser.add_argument("--placements", nargs="+", default=list(POLICIES), choices=POLICIES,
                        help="run only these of each part (default: all)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS / "cluster_sim.jsonl",
                        help="append JSON lines to this file (default: %(default)s)")  # fmt: skip
    options = parser.parse_args(argv)
    if unknown := set(options.parts) - {"slora", "day"}:
        parser.error(f"unknown part {', '.join(sorted(unknown))}: use slora, day or both")
    if options.trace and not options.rate:
        parser.error("--trace needs --rate, in requests a second")
    print(NOTE)
    cases: list[Case] = []
    if "slora" in options.parts:
        cases += slora_cases(options.rates, options.seconds)
    if "day" in options.parts:
        cases += day_cases()
    if options.trace:
        cases += trace_cases(options.trace, options.rate, options.seconds)
    for case in (case for case in cases if case.placement in options.placements):
        result = case.run()
        row = case.describe() | result.figures(OBJECTIVE_S)
        if case.part == "day":
            row["engines_in_use"] = [(round(at, 2), n) for at, n in result.engines_in_use]
        show(case, row)
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
