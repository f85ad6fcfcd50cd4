"""Measures block sizes of the Triton SGMV kernels on this GPU and writes the best to a table.

Each candidate of a kernel runs with the best of the other so far, shrink and expand in turn as in
a layer. They run in a CUDA graph over layers of different weights, inputs and outputs, so that
nothing is in the L2 cache. Whole layers are timed at the end, since groups that are fast alone may
be slow as neighbours. Blocks slower than the defaults stay out of the table. Several processes
compile the kernels beforehand. Takes about a minute. Results for other compute capabilities stay
in the table.

    python benchmarks/kernels/tune_sgmv.py --out backends/lora/sgmv/tuned.py
"""

import argparse
import math
import multiprocessing
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from lora_kernels import ALL, Case, Setup, time_graph

from loraplex.backends.lora.contract import LoRAGroup, apply_lora
from loraplex.backends.lora.sgmv.blocks import (
    ExpandBlocks,
    Regime,
    ShrinkBlocks,
    Tuned,
    as_tuned,
    expand_blocks,
    shrink_blocks,
)
from loraplex.backends.lora.sgmv.launch import SGMVPlan
from loraplex.backends.lora.sgmv.triton_sgmv import TritonSGMV
from loraplex.backends.lora.sgmv.tuned import TUNED

NUM_REPEATS = 7
MAX_PROCESSES = 12


def shrinks(
    sizes: Iterable[tuple[int, int, int, int]], waves: Iterable[int]
) -> tuple[ShrinkBlocks, ...]:
    return tuple(ShrinkBlocks(*size, wave) for size, wave in product(sizes, waves))


def expands(
    sizes: Iterable[tuple[int, int, int, int, int]], waves_and_panels: Iterable[tuple[int, int]]
) -> tuple[ExpandBlocks, ...]:
    return tuple(ExpandBlocks(*size, *pair) for size, pair in product(sizes, waves_and_panels))


@dataclass(frozen=True)
class Study:
    """One regime and rank class: batches of equal weight, and the candidates."""

    regime: Regime
    rank_class: int
    cases: tuple[Case, ...]
    shrinks: tuple[ShrinkBlocks, ...]
    expands: tuple[ExpandBlocks, ...]


def studies() -> list[Study]:
    def prefill(ranks: tuple[int, ...]) -> tuple[Case, ...]:
        return (Case("llama-3-8b", ranks, ALL, 4096, "runs-8", num_layers=4),)

    decode = tuple(
        Case("llama-3-8b", (16,), ALL, rows, popularity, num_layers=8)
        for rows, popularity in (
            (64, "uniform"), (64, "identical"), (256, "uniform"), (256, "identical")
        )
    )  # fmt: skip
    return [
        Study(
            "decode", 16, decode,
            shrinks(
                [(16, 16, 1, 8), (16, 16, 2, 6), (16, 16, 2, 8), (16, 16, 2, 12), (16, 16, 4, 8),
                 (16, 32, 2, 8), (16, 32, 4, 6), (16, 64, 4, 5)],
                (2, 4, 8),
            ),
            expands(
                [(16, 64, 16, 2, 255), (16, 64, 16, 4, 128), (16, 128, 16, 2, 255),
                 (16, 128, 16, 4, 128), (16, 128, 16, 4, 168), (16, 256, 16, 4, 255),
                 (16, 256, 16, 8, 128)],
                ((2, 16), (4, 16), (8, 16), (16, 4)),
            ),
        ),
        Study(
            "prefill", 16, prefill((16,)),
            shrinks(
                [(64, 64, 4, 4), (64, 64, 4, 6), (64, 64, 8, 5), (128, 64, 4, 4), (128, 64, 8, 4),
                 (128, 64, 8, 6), (32, 64, 4, 6)],
                (1, 2, 3, 4),
            ),
            expands(
                [(64, 128, 16, 8, 128), (64, 128, 16, 4, 255), (64, 128, 16, 4, 168),
                 (32, 128, 16, 4, 128), (32, 256, 16, 8, 128), (64, 256, 16, 8, 255),
                 (128, 64, 16, 8, 128), (128, 128, 16, 8, 255), (16, 256, 16, 4, 255)],
                ((2, 16), (2, 64), (4, 4), (4, 8), (16, 2), (64, 1)),
            ),
        ),
        Study(
            "prefill", 64, prefill((64, 8)),
            shrinks(
                [(64, 64, 4, 4), (64, 128, 4, 4), (64, 128, 8, 4), (64, 256, 8, 3),
                 (128, 64, 8, 4), (128, 128, 8, 3), (128, 128, 8, 4)],
                (1, 2, 3),
            ),
            expands(
                [(64, 128, 64, 8, 128), (64, 128, 64, 8, 255), (64, 64, 64, 4, 168),
                 (64, 64, 64, 8, 128), (32, 128, 64, 4, 168), (32, 128, 64, 8, 128),
                 (64, 128, 32, 8, 128), (128, 128, 64, 8, 255)],
                ((2, 16), (4, 4), (4, 8), (16, 2)),
            ),
        ),
    ]  # fmt: skip


Planned = tuple[TritonSGMV, SGMVPlan]


class Bench:
    """The setup of one case, with inputs and outputs of their own for every layer."""

    def __init__(self, case: Case) -> None:
        self.setup = Setup(case, torch.bfloat16, torch.device("cuda", 0))
        copies = range(case.num_layers)
        self.x = [[x.clone() for _ in copies] for x in self.setup.x]
        self.y = [[y.clone() for _ in copies] for y in self.setup.y]

    def plan_with(
        self, study: Study, shrinks: Mapping[int, ShrinkBlocks], expand: ExpandBlocks | None = None
    ) -> Planned:
        """Returns an op with these blocks and its plan; `shrinks` are by input features."""
        tuned = Tuned()
        for features, shrink in shrinks.items():
            tuned.shrink[study.regime, study.rank_class, features] = shrink
        if expand is not None:
            tuned.expand[study.regime, study.rank_class, 1] = expand
        return self.plan(tuned)

    def plan(self, tuned: Tuned) -> Planned:
        op = TritonSGMV(self.setup.spec(), tuned)
        return op, op.plan(table=self.setup.table, batch=self.setup.batch)

    def run(self, planned: Planned, index: int, layer: int) -> None:
        apply_lora(
            *planned, y=self.y[index][layer], x=self.x[index][layer], pool=self.setup.pool,
            layer=layer, group=self.setup.groups[index],
        )  # fmt: skip

    def time_layer(self, tuned: Tuned) -> float:
        """Microseconds of all groups, one after the other."""
        planned = self.plan(tuned)
        layers = self.setup.case.num_layers

        def run() -> None:
            for layer in range(layers):
                for index in range(len(self.setup.groups)):
                    self.run(planned, index, layer)

        return statistics.median(time_graph(run, NUM_REPEATS)) / layers

    def time(self, planned: Planned, index: int) -> float:
        """Microseconds of one group's shrink and expand."""
        layers = self.setup.case.num_layers

        def run() -> None:
            for layer in range(layers):
                self.run(planned, index, layer)

        return statistics.median(time_graph(run, NUM_REPEATS)) / layers


def defaults(
    study: Study, groups: Sequence[LoRAGroup], kernel: str
) -> list[ShrinkBlocks | ExpandBlocks]:
    """Returns the blocks that run without a table."""
    if kernel == "shrink":
        sizes = {group.in_features for group in groups}
        return [shrink_blocks(Tuned(), study.regime, study.rank_class, n) for n in sizes]
    widths = {sum(group.out_features) for group in groups}
    return [expand_blocks(Tuned(), study.regime, study.rank_class, n) for n in widths]


@lru_cache(maxsize=1)
def small_bench(case: Case) -> Bench:
    return Bench(replace(case, num_layers=1))


def compile_candidate(study: Study, candidate: ShrinkBlocks | ExpandBlocks) -> None:
    """Run once, in a process of its own, so that the kernels are in Triton's cache on disk."""
    bench = small_bench(study.cases[0])
    if isinstance(candidate, ShrinkBlocks):
        planned = bench.plan_with(study, {1: candidate})
    else:
        planned = bench.plan_with(study, {}, candidate)
    for index in range(len(bench.setup.groups)):
        bench.run(planned, index, 0)
    torch.cuda.synchronize()


def compile_all(all_studies: list[Study]) -> None:
    jobs = {}
    for study in all_studies:
        for shrink in study.shrinks:
            jobs[study, astuple(shrink)[:4]] = (study, shrink)
        for expand in study.expands:
            jobs[study, astuple(expand)[:5]] = (study, expand)
    workers = min(MAX_PROCESSES, os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = [pool.submit(compile_candidate, *job) for job in jobs.values()]
        for future in futures:
            future.exception()  # `measure` leaves out candidates that cannot run here


def measure(study: Study, benches: list[Bench]) -> list[tuple[Any, ...]]:
    """Rows of the table: (kernel, regime, rank class, features, sizes)."""
    rows: list[tuple[Any, ...]] = []
    groups = benches[0].setup.groups
    best: dict[int, ShrinkBlocks] = {}
    for kernel, candidates in (("shrink", study.shrinks), ("expand", study.expands)):
        # features -> candidate -> product of its times over batches and groups
        scores: dict[int, dict[Any, float]] = defaultdict(dict)
        for candidate in dict.fromkeys((*defaults(study, groups, kernel), *candidates)):
            try:
                for bench in benches:
                    if isinstance(candidate, ShrinkBlocks):
                        planned = bench.plan_with(study, {1: candidate})
                    else:
                        planned = bench.plan_with(study, best, candidate)
                    for index, group in enumerate(groups):
                        is_shrink = kernel == "shrink"
                        size = group.in_features if is_shrink else sum(group.out_features)
                        us = bench.time(planned, index)
                        scores[size][candidate] = scores[size].get(candidate, 0) + math.log(us)
            except Exception as error:  # too much shared memory, too many registers
                for of_size in scores.values():
                    of_size.pop(candidate, None)
                print(f"  {kernel} {astuple(candidate)}: {type(error).__name__}: {error}"[:160])
        counts = defaultdict(int)
        for group in groups:
            counts[group.in_features if kernel == "shrink" else sum(group.out_features)] += 1
        for size, of_size in sorted(scores.items()):
            ranked = sorted(of_size, key=of_size.__getitem__)
            for place, candidate in enumerate(ranked[:3]):
                mean = math.exp(of_size[candidate] / (counts[size] * len(benches)))
                print(f"  {kernel} {size:6} #{place + 1} {astuple(candidate)} {mean:8.2f} us")
            rows.append((kernel, study.regime, study.rank_class, size, astuple(ranked[0])))
            if kernel == "shrink":
                best[size] = ranked[0]
    return rows if is_faster(rows, benches) else []


def is_faster(rows: list[tuple[Any, ...]], benches: list[Bench]) -> bool:
    """Returns whether whole layers are faster than with the defaults, by the geometric mean over
    the batches."""
    gain = 0.0
    for bench in benches:
        times = [bench.time_layer(tuned) for tuned in (Tuned(), as_tuned(rows))]
        gain += math.log(times[0] / times[1])
        print(f"  layer, {bench.setup.case.popularity}: {times[0]:.2f} us, tuned {times[1]:.2f} us")
    return gain > 0


def write_table(path: Path, table: dict[tuple[int, int], tuple[tuple[Any, ...], ...]]) -> None:
    lines = [
        '"""Written by benchmarks/kernels/tune_sgmv.py: the fastest measured block sizes.',
        "",
        "By compute capability: (kernel, regime, rank class, features, sizes of blocks.py).",
        '"""',
        "",
        "from typing import Any",
        "",
        "TUNED: dict[tuple[int, int], tuple[tuple[Any, ...], ...]] = {",
    ]
    for capability, rows in sorted(table.items()):
        lines.append(f"    {capability}: (")
        for kernel, regime, ranks, features, sizes in rows:
            lines.append(f'        ("{kernel}", "{regime}", {ranks}, {features}, {sizes}),')
        lines.append("    ),")
    path.write_text("\n".join([*lines, "}", ""]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the table to write")
    options = parser.parse_args()
    started = time.monotonic()
    all_studies = studies()
    compile_all(all_studies)
    print(f"compiled after {time.monotonic() - started:.0f} s", flush=True)
    rows: list[tuple[Any, ...]] = []
    for study in all_studies:
        print(study.regime, "rank", study.rank_class, flush=True)
        benches = [Bench(case) for case in study.cases]
        rows += measure(study, benches)
        del benches
        torch.cuda.empty_cache()
        print(f"after {time.monotonic() - started:.0f} s", flush=True)
    write_table(options.out, {**TUNED, torch.cuda.get_device_capability(): tuple(rows)})


if __name__ == "__main__":
    main()
