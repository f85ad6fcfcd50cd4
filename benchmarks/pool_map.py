"""Measures by how much a map of the page pool can make a plan late.

Runs the real scheduler loop on a CPU, as scheduler_step.py does, with 1,000 resident adapters and
64 requests that decode all the while.

    python benchmarks/pool_map.py [--pages 10000 100000 1000000]

prints a line for each size of the pool and appends to benchmarks/results/pool_map_cpu.jsonl.
`map_ms` is the CPU time of making and encoding a map alone, the least of 100. `longest_ms` is the
longest turn of the loop, without planning and committing, while statistics with the map are asked
for. `stats_ms` is the same for statistics without it, and `calm_ms` the median turn without any.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

from loraplex.engine.ipc import codec
from loraplex.engine.ipc.messages.frontend import StatsQuery, StatsReply
from loraplex.engine.ipc.messages.pool_map import MAX_POOL_CELLS, map_pool
from loraplex.memory.accounting.page_manager import PageManager

from scheduler_step import NUM_RESIDENT, delay

RESULTS = Path(__file__).parent / "results" / "pool_map_cpu.jsonl"


def map_ms(num_pages: int, rounds: int) -> float:
    """Returns the CPU time of making and encoding one map, in milliseconds."""
    memory = PageManager(
        num_pages=num_pages,
        block_tokens=16,
        max_adapter_slots=1024,
        enable_prefix_caching=True,
        unload=lambda slot: None,
    )
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        codec.encode(StatsReply(1, {}, [map_pool(memory, MAX_POOL_CELLS)]))
        times.append(time.thread_time() - start)
    return 1e3 * min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    for num_pages in args.pages:
        plain = delay(
            lambda rig, _: rig.post(StatsQuery(1)), rounds=args.rounds, num_pages=num_pages
        )
        mapped = delay(
            lambda rig, _: rig.post(StatsQuery(1, pool_cells=MAX_POOL_CELLS)),
            rounds=args.rounds,
            num_pages=num_pages,
        )
        line = {
            "pages": num_pages,
            "cells": MAX_POOL_CELLS,
            "resident_adapters": NUM_RESIDENT,
            "map_ms": round(map_ms(num_pages, 100), 4),
            "longest_ms": round(mapped["longest"], 4),
            "stats_ms": round(plain["longest"], 4),
            "calm_ms": round(mapped["calm"], 4),
            "turns": mapped["num_turns"],
            "machine": "2-core CPU machine, shared",
            "load": round(os.getloadavg()[0], 1),
            "python": platform.python_version(),
            "rounds": args.rounds,
        }
        print(json.dumps(line), flush=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
