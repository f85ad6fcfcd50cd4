"""Traces for a cluster: S-LoRA's lengths, Azure's CSV and Mooncake's JSON lines, a day's curve.

None names adapters; they are drawn by Zipf's law.
"""

import csv
import json
import math
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import numpy as np

from loraplex.entrypoints.bench.traces import SEED, make_trace

from sim_result import SimRequest

Row = tuple[float, int, int]  # arrival in seconds, prompt tokens, new tokens


def slora_rows(rate: float, seconds: float) -> list[Row]:
    """S-LoRA's generator: lengths uniform in [8, 512), Poisson arrivals."""
    trace = make_trace(round(rate * seconds), 0, rate=rate)
    return [(r.arrival_s, r.num_prompt_tokens, r.num_new_tokens) for r in trace]


def day_rows(peak_rate: float, seconds: float) -> list[Row]:
    """S-LoRA's lengths over a day's curve, pressed into `seconds`.

    The rate is a sine between 15 % of the peak at its start and the peak at half time.
    """
    grid = np.linspace(0.0, seconds, 1000)
    rates = peak_rate * (0.575 - 0.425 * np.cos(2 * math.pi * grid / seconds))
    expected = np.concatenate([[0.0], np.cumsum((rates[1:] + rates[:-1]) / 2 * np.diff(grid))])
    rows = slora_rows(1.0, float(expected[-1]))
    arrivals = np.interp([row[0] for row in rows], expected, grid)
    return [(float(at), row[1], row[2]) for at, row in zip(arrivals, rows, strict=True)]


def read_rows(path: Path) -> list[Row]:
    """Read a trace file: .csv as Azure's, .jsonl as Mooncake's. Arrivals start at 0.

    Raises ValueError for another suffix or a file without its columns.
    """
    readers = {".csv": _read_azure, ".jsonl": _read_mooncake}
    if path.suffix not in readers:
        raise ValueError(f"{path}: a trace file ends in .csv (Azure) or .jsonl (Mooncake)")
    try:
        rows = sorted(readers[path.suffix](path))
    except KeyError as error:
        raise ValueError(f"{path}: column {error} is missing") from None
    if not rows:
        raise ValueError(f"{path}: no requests")
    return [(arrival - rows[0][0], prompt, new) for arrival, prompt, new in rows]


def press(rows: list[Row], rate: float, seconds: float) -> list[Row]:
    """Speed the arrivals up to `rate` requests a second on average; take the first `seconds`."""
    speed = rate / (len(rows) / rows[-1][0])
    return [(at / speed, prompt, new) for at, prompt, new in rows if at / speed < seconds]


def with_adapters(rows: list[Row], num_adapters: int, alpha: float = 1.0) -> list[SimRequest]:
    """Draw adapter k, from 0 on, with a probability proportional to 1 / (k + 1)^alpha."""
    weights = np.arange(1, num_adapters + 1, dtype=float) ** -alpha
    drawn = np.random.default_rng(SEED).choice(
        num_adapters, size=len(rows), p=weights / weights.sum()
    )
    return [SimRequest(*row, adapter) for row, adapter in zip(rows, drawn.tolist(), strict=True)]


def _read_azure(path: Path) -> Iterator[Row]:
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            arrival = datetime.fromisoformat(row["TIMESTAMP"]).timestamp()
            new = max(1, int(row["GeneratedTokens"]))
            yield arrival, max(1, int(row["ContextTokens"])), new


def _read_mooncake(path: Path) -> Iterator[Row]:
    with path.open() as file:
        for line in file:
            row = json.loads(line)
            new = max(1, row["output_length"])
            yield row["timestamp"] / 1e3, max(1, row["input_length"]), new
