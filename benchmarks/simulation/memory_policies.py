"""Simulates ways of managing memory: what do one pool, eviction by cost and prefetch bring?

The scheduler, its queues, pages and adapters are real. The seconds come from the cost model of
Llama-2-7B on one H200 in modelled_worker.py. No GPU is used.

    python benchmarks/simulation/memory_policies.py

writes benchmarks/results/memory_sim.jsonl, in a minute or two.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loraplex.entrypoints.bench.traces import make_trace
from loraplex.memory.accounting.page_manager import PageManager
from loraplex.scheduler.config import SchedulerConfig

from memory_variants import FixedSlotsPageManager, lru_page_manager, no_prefetch
from modelled_worker import CostModel
from sim_result import SimRequest, SimResult
from simulator import simulate

RESULTS = Path(__file__).parents[1] / "results"
NOTE = "simulation: the real scheduler, a modelled worker (Llama-2-7B on one H200), virtual time"
SECONDS = 40.0
NUM_PAGES = 3_000  # of 8 MiB: 25 GB
PAGES = (16, 8, 4, 2)  # ranks 64, 32, 16, 8 on q, k, v, o


@dataclass(frozen=True)
class Variant:
    """One way of managing the pool; `num_slots` is 0 where KV and adapters share it."""

    name: str
    page_manager: Callable[..., PageManager] = PageManager
    num_slots: int = 0
    patch: Callable[[], AbstractContextManager[None]] = nullcontext


VARIANTS = (
    Variant("one pool"),
    Variant("one pool, LRU", lru_page_manager),
    Variant("one pool, no prefetch", patch=no_prefetch),
    Variant("32 fixed slots", FixedSlotsPageManager, 32),
    Variant("64 fixed slots", FixedSlotsPageManager, 64),
    Variant("128 fixed slots", FixedSlotsPageManager, 128),
)


@dataclass(frozen=True)
class Load:
    """Requests a second over adapters drawn by power(alpha)."""

    num_adapters: int
    rate: float
    alpha: float = 1.0

    def trace(self) -> list[SimRequest]:
        requests = make_trace(
            round(self.rate * SECONDS), self.num_adapters, alpha=self.alpha, rate=self.rate
        )
        return [
            SimRequest(r.arrival_s, r.num_prompt_tokens, r.num_new_tokens, r.adapter)
            for r in requests
        ]


LOADS = (Load(200, 27.0), Load(1000, 27.0))


def run(load: Load, variant: Variant) -> SimResult:
    set_apart = variant.num_slots * max(PAGES)
    with variant.patch():
        return simulate(
            load.trace(),
            config=SchedulerConfig(),
            num_pages=NUM_PAGES - set_apart,
            adapter_pages=lambda adapter: PAGES[adapter % len(PAGES)],
            max_adapter_slots=variant.num_slots or 1024,
            page_manager=variant.page_manager,
            share_pool=not variant.num_slots,
        )


def figures(result: SimResult) -> dict[str, Any]:
    ttfts = sorted(o.ttft_s for o in result.timelines if o.ttft_s is not None)
    return {
        "requests": len(result.timelines),
        "failed": sum(bool(o.error_code) for o in result.timelines),
        "new_tokens_per_s": round(result.num_new_tokens / result.end_s),
        "ttft_mean_s": round(statistics.fmean(ttfts), 3),
        "ttft_p50_s": round(ttfts[len(ttfts) // 2], 3),
        "ttft_p99_s": round(ttfts[int(len(ttfts) * 0.99)], 3),
        "adapter_loads": result.num_loads,
        "preemptions": result.num_preemptions,
    }


def rows() -> Iterator[dict[str, Any]]:
    for load in LOADS:
        for variant in VARIANTS:
            yield {
                "benchmark": "benchmarks/simulation/memory_policies.py",
                "simulation": NOTE,
                "variant": variant.name,
                "trace": asdict(load) | {"seconds": SECONDS, "lengths": [8, 512]},
                "num_pages": NUM_PAGES,
                "pages_set_apart": variant.num_slots * max(PAGES),
                "adapter_pages": PAGES,
                "cost_model": asdict(CostModel()),
            } | figures(run(load, variant))


def show(row: dict[str, Any]) -> None:
    trace = row["trace"]
    print(
        f"n={trace['num_adapters']:<5} alpha {trace['alpha']:g} {trace['rate']:g}/s | "
        f"{row['variant']:22} | {row['new_tokens_per_s']:6} tok/s | ttft mean "
        f"{row['ttft_mean_s']:6.2f} p50 {row['ttft_p50_s']:6.2f} p99 {row['ttft_p99_s']:6.2f} s | "
        f"{row['adapter_loads']:5} loads, {row['preemptions']:4} preemptions",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "memory_sim.jsonl")
    options = parser.parse_args()
    print(NOTE)
    lines = []
    for row in rows():
        show(row)
        lines.append(json.dumps(row) + "\n")
    options.out.write_text("".join(lines))


if __name__ == "__main__":
    main()
