"""Simulates the scheduling policies: do they order requests as their papers say?

The scheduler, its queues, pages and adapters are real. The seconds come from the cost model of
Llama-2-7B on one H200 in modelled_worker.py. No GPU is used.

    python benchmarks/simulation/policies.py --plot policies.svg

writes benchmarks/results/policies_sim.jsonl, in about two minutes.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loraplex.engine.errors import ConfigError
from loraplex.entrypoints.bench.plot import Line, Panel, check_plot, draw
from loraplex.entrypoints.bench.traces import make_trace
from loraplex.scheduler.config import SchedulerConfig

from modelled_worker import CostModel
from policy_figures import attainment, max_service_gap, service_gaps, vtc_bound
from sim_result import SimRequest, SimResult
from simulator import simulate

RESULTS = Path(__file__).parents[1] / "results"
NOTE = "simulation: the real scheduler, a modelled worker (Llama-2-7B on one H200), virtual time"
SLO_S = 6.0
SECONDS = 60.0
PAGES_S1 = (2,)  # rank 8 on q, k, v, o
PAGES_S2 = (16, 8, 4, 2)  # ranks 64, 32, 16, 8
LARGE_POOL, SMALL_POOL = 13_000, 5_000  # pages of 8 MiB: what an H200 leaves, and 42 GB
POLICY_OPTIONS = (
    "policy", "max_wait_s", "max_adapters_per_batch", "ttft_slo_s", "fair_share_weights",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One run. Tenants are (name, requests a second). Adapters are drawn by power(alpha)."""

    question: str
    policy: dict[str, Any]
    tenants: tuple[tuple[str, float], ...]
    cv: float = 1.0
    num_adapters: int = 0
    alpha: float = 1.0
    pages: tuple[int, ...] = PAGES_S1
    num_pages: int = LARGE_POOL

    @property
    def config(self) -> SchedulerConfig:
        return SchedulerConfig(**self.policy)

    @property
    def label(self) -> str:
        name = str(self.policy["policy"])
        options = [f"{v}" for k, v in self.policy.items() if k == "max_adapters_per_batch"]
        options += [f"{n}={w}" for n, w in self.policy.get("fair_share_weights", ())]
        return " ".join([name, *options])

    def trace(self) -> list[SimRequest]:
        requests = [
            SimRequest(r.arrival_s, r.num_prompt_tokens, r.num_new_tokens, r.adapter, tenant)
            for seed, (tenant, rate) in enumerate(self.tenants, 42)
            for r in make_trace(
                round(rate * SECONDS),
                self.num_adapters,
                alpha=self.alpha,
                rate=rate,
                cv=self.cv,
                seed=seed,
            )
        ]
        return sorted(requests, key=lambda request: request.arrival_s)

    def run(self) -> SimResult:
        return simulate(
            self.trace(),
            config=self.config,
            num_pages=self.num_pages,
            adapter_pages=lambda adapter: self.pages[adapter % len(self.pages)],
        )


def cases() -> Iterator[Case]:
    for cv in (1.0, 4.0):
        for rate in (20.0, 30.0, 40.0, 50.0, 60.0):
            for name in ("fcfs", "abort"):
                policy = {"policy": name, "ttft_slo_s": SLO_S}
                yield Case("abort", policy, (("", rate),), cv=cv, num_adapters=100)
    for name in ("fcfs", "vtc"):  # the light one asks for less than its share
        yield Case("isolation", {"policy": name}, (("heavy", 100.0), ("light", 10.0)))
    fair = Case("fairness", {"policy": "fcfs"}, (("heavy", 100.0), ("light", 25.0)))
    yield fair
    yield replace(fair, policy={"policy": "vtc"})
    yield replace(fair, policy={"policy": "vtc", "fair_share_weights": (("heavy", "3"),)})
    for num_pages in (LARGE_POOL, SMALL_POOL):
        for alpha in (1.0, 0.3):
            many = Case(
                "clustering",
                {"policy": "fcfs"},
                (("", 50.0),),
                num_adapters=1000,
                alpha=alpha,
                pages=PAGES_S2,
                num_pages=num_pages,
            )
            yield many
            for limit in (32, 128):
                yield replace(many, policy={"policy": "cluster", "max_adapters_per_batch": limit})


def figures(case: Case, result: SimResult) -> dict[str, Any]:
    ttfts = _ttfts(result)
    found: dict[str, Any] = {
        "requests": len(result.timelines),
        "given_up": sum(o.error_code == "deadline" for o in result.timelines),
        "attainment": round(attainment(result, SLO_S), 4),
        "ttft_mean_s": round(statistics.fmean(ttfts), 3),
        "ttft_p50_s": round(_percentile(ttfts, 50), 3),
        "ttft_p99_s": round(_percentile(ttfts, 99), 3),
        "new_tokens_per_s": round(result.num_new_tokens / result.end_s),
        "adapters_per_step": round(statistics.fmean(result.step_adapters), 1),
        "adapter_loads": result.num_loads,
        "preemptions": result.num_preemptions,
    }
    if len(case.tenants) > 1:
        gap, seconds = max_service_gap(result, _weights(case))
        found["service_gap"] = round(gap)
        found["both_backlogged_s"] = round(seconds, 1)
        found["ttft_p99_by_tenant_s"] = {
            name: round(_percentile(_ttfts(result, name), 99), 2) for name, _ in case.tenants
        }
        found["bound"] = round(vtc_bound(case.trace(), num_seats=case.config.max_num_seqs))
    return found


def _weights(case: Case) -> dict[str, float]:
    return {name: case.config.weights.get(name, 1.0) for name, _ in case.tenants}


def _ttfts(result: SimResult, tenant: str | None = None) -> list[float]:
    """Seconds to first tokens, in ascending order, of the requests that got one."""
    return sorted(
        o.ttft_s
        for o in result.timelines
        if o.ttft_s is not None and tenant in (None, o.request.tenant)
    )


def _percentile(ordered: Sequence[float], percent: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def describe(case: Case) -> dict[str, Any]:
    """Set-up of a case, which is written beside its numbers."""
    options = asdict(case.config)
    return {
        "benchmark": "benchmarks/simulation/policies.py",
        "simulation": NOTE,
        "question": case.question,
        "label": case.label,
        "scheduler": {name: options[name] for name in POLICY_OPTIONS}
        | {"max_num_seqs": case.config.max_num_seqs},
        "trace": {
            "tenants": dict(case.tenants), "seconds": SECONDS, "cv": case.cv,
            "adapters": case.num_adapters, "alpha": case.alpha, "lengths": [8, 512],
        },
        "adapter_pages": case.pages,
        "num_pages": case.num_pages,
        "slo_s": SLO_S,
        "cost_model": asdict(CostModel()),
    }  # fmt: skip


def show(case: Case, row: dict[str, Any]) -> None:
    rate = "+".join(f"{rate:g}" for _, rate in case.tenants)
    gap = ""
    if "bound" in row:
        gap = (
            f" | service gap {row['service_gap']:,} in {row['both_backlogged_s']} s (bound "
            f"{row['bound']:,}), ttft p99 {row['ttft_p99_by_tenant_s']}"
        )
    print(
        f"{case.question:10} {case.label:12} {rate:>6}/s cv {case.cv:g} n={case.num_adapters:<4} "
        f"alpha {case.alpha:g} {case.num_pages:6} pages | in time {row['attainment']:6.1%} "
        f"given up {row['given_up']:4} | ttft mean {row['ttft_mean_s']:6.2f} p50 "
        f"{row['ttft_p50_s']:6.2f} p99 {row['ttft_p99_s']:6.2f} s | {row['new_tokens_per_s']:6} "
        f"tok/s | {row['adapters_per_step']:5.1f} adapters a step, {row['adapter_loads']:4} loads"
        f"{gap}",
        flush=True,
    )


def make_panels(
    rows: Sequence[tuple[Case, dict[str, Any]]], runs: dict[str, SimResult]
) -> list[Panel]:
    """Panels of attainment by rate, service gap over time, and first-token time by percentile."""
    aborts = [
        Line(
            f"{name}, cv {cv:g}",
            [
                (case.tenants[0][1], 100 * row["attainment"])
                for case, row in rows
                if case.question == "abort" and (case.policy["policy"], case.cv) == (name, cv)
            ],
            dashed=cv == 1.0,
        )
        for name in ("fcfs", "abort")
        for cv in (1.0, 4.0)
    ]
    fair = {case.label: (case, row) for case, row in rows if case.question == "fairness"}
    gaps = []
    for label in ("fcfs", "vtc"):
        points = service_gaps(runs[f"fairness {label}"], _weights(fair[label][0]))
        gaps.append(Line(label, [(t, abs(gap)) for t, gap in points if 1 <= t <= SECONDS][::20]))
    bound = float(fair["vtc"][1]["bound"])
    gaps.append(Line("VTC's bound", [(1.0, bound), (SECONDS, bound)], dashed=True))
    latencies = []
    for label in ("fcfs", "cluster 32", "cluster 128"):
        ttfts = _ttfts(runs[f"clustering {label}"])
        points = [(float(p), _percentile(ttfts, p)) for p in range(0, 100)]
        latencies.append(Line(label, points))
    return [
        Panel("Early abort: first token within 6 s", "requests/s", "% of requests", aborts),
        Panel("VTC: service gap, 100/s against 25/s", "s", "tokens, weighted", gaps, log_y=True),
        Panel(
            f"Clustering: n=1000, {SMALL_POOL} pages, alpha 0.3", "percentile",
            "time to first token, s", latencies,
        ),
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Simulate the scheduling policies.")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "policies_sim.jsonl",
        help="write JSON lines to this file (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--plot", type=Path, help="plot the results to this .svg or .png file; needs matplotlib"
    )
    options = parser.parse_args(argv)
    if options.plot:
        try:
            check_plot(options.plot)
        except ConfigError as error:
            parser.error(str(error))
    print(NOTE)
    rows: list[tuple[Case, dict[str, Any]]] = []
    runs: dict[str, SimResult] = {}
    for case in cases():
        result = case.run()
        row = figures(case, result)
        show(case, row)
        rows.append((case, row))
        runs[f"{case.question} {case.label}"] = result
    options.out.write_text("".join(json.dumps(describe(case) | row) + "\n" for case, row in rows))
    if options.plot:
        draw(make_panels(rows, runs), options.plot, caption=NOTE)


if __name__ == "__main__":
    main()
