"""`loraplex bench` and benchmarks/papers over the tiny model on the CPU, as a user runs them."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytestmark = pytest.mark.e2e

TIMEOUT_S = 280
PAPERS = Path(__file__).resolve().parents[2] / "benchmarks" / "papers"
TINY = ["--model", "tiny", "--device", "cpu", "--num-pages", "400", "--max-num-seqs", "8"]


def command(kind: str) -> list[str]:
    if (script := PAPERS / f"{kind}.py").exists():
        return [sys.executable, str(script)]
    return [sys.executable, "-P", "-m", "loraplex.entrypoints.cli.main", "bench", kind]


def bench(
    kind: str, out: Path, *arguments: str, engine: Sequence[str] = TINY, num_notes: int = 0
) -> list[dict[str, Any]]:
    """Rows of a run. The table on the screen has as many, and the plot is an SVG file."""
    plot = out.with_suffix(".svg")
    run = subprocess.run(
        [*command(kind), *engine, "--ranks", "4,8", "--out", str(out), "--plot", str(plot),
         *arguments],
        capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(run.stdout.splitlines()) == len(rows) + 1 + num_notes, run.stdout
    assert "note:" not in run.stderr
    ElementTree.parse(plot)
    for row in rows:
        assert row["bench"] == kind
        assert (row["model"], row["device"], row["ranks"]) == ("tiny", "cpu", [4, 8])
        assert "TTFT" in row["measured"]
    return rows


def check_gaps(median_ms: float, p99_ms: float) -> None:
    """A busy client reads several messages at once, so most gaps may be zero, but not all."""
    assert 0 <= median_ms <= p99_ms
    assert p99_ms > 0


def test_throughput(tmp_path: Path) -> None:
    rows = bench(
        "throughput", tmp_path / "out.jsonl", "--num-adapters", "0,4", "--num-requests", "10",
        "--lengths", "4,24",
    )  # fmt: skip
    assert [row["num_adapters"] for row in rows] == [0, 4]
    base, mixed = rows
    assert base["new_tokens"] == mixed["new_tokens"] >= 40
    assert base["of_base"] == 1.0 and mixed["of_base"] > 0
    for row in rows:
        assert row["new_tokens_per_s"] == pytest.approx(
            row["new_tokens"] / row["seconds"], rel=0.01
        )
        assert 0 < row["ttft_ms_p50"] <= row["ttft_ms_p99"]
        check_gaps(row["inter_token_ms_p50"], row["inter_token_ms_p99"])


@pytest.mark.long
def test_latency(tmp_path: Path) -> None:
    rows = bench(
        "latency", tmp_path / "out.jsonl", "--batches", "1,4", "--popularity", "base,distinct",
        "--prompt-len", "16", "--answer-len", "12", "--repeats", "2", "--lora-modules", "all",
    )  # fmt: skip
    assert [(r["batch"], r["num_adapters"]) for r in rows] == [(1, 0), (1, 1), (4, 0), (4, 4)]
    for row in rows:
        check_gaps(row["step_ms"], row["step_ms_p99"])
        assert row["new_tokens"] == row["batch"] * 12
        assert len(row["step_ms_of_runs"]) == 2


@pytest.mark.long
def test_serve(tmp_path: Path) -> None:
    (row,) = bench(
        "serve", tmp_path / "out.jsonl", "--rates", "15", "--duration", "1", "--num-adapters", "3",
        "--lengths", "4,24", "--ttft-objective", "600",
    )  # fmt: skip
    assert (row["num_requests"], row["num_failed"], row["first_failure"]) == (15, 0, None)
    assert row["attainment"] == 1.0
    assert 0 < row["ttft_ms_p50"] <= row["ttft_ms_p99"]


@pytest.mark.long
def test_cluster(tmp_path: Path) -> None:
    rows = bench(
        "cluster", tmp_path / "out.jsonl", "--num-adapters", "3", "--num-requests", "10",
        "--lengths", "4,24", "--kill", "--max-model-len", "256",
    )  # fmt: skip
    one, both, killed = rows
    assert [row["case"] for row in rows] == ["one engine", "cluster", "one engine killed"]
    assert [row["num_requests"] for row in rows] == [10, 20, 64]
    assert both["new_tokens"] > one["new_tokens"] >= 40 and one["engines"] == 1
    assert both["of_linear"] == pytest.approx(
        both["new_tokens_per_s"] / one["new_tokens_per_s"] / 2, rel=0.01
    )
    assert 0 < both["alone_ttft_ms_p50"] <= both["alone_ttft_ms_p99"]
    assert both["moves"] == 0 and both["router_cores"] > 0
    assert killed["moves"] > 0 and killed["longest_pause_s"] >= killed["longest_pause_p50_s"] > 0
    assert killed["new_tokens"] == 64 * (256 - 32)


def test_slora(tmp_path: Path) -> None:
    rows = bench(
        "slora", tmp_path / "out.jsonl", "--num-adapters", "6,0", "--num-registered", "300",
        "--num-requests", "12", "--lengths", "4,16", "--rates", "inf,12", "--duration", "1",
        "--weight-files", "2", "--ttft-objective", "600", num_notes=1,
    )  # fmt: skip
    assert [(row["num_adapters"], row["load"]) for row in rows] == [
        (0, "saturated"), (0, "12/s, cv 1"), (6, "saturated"), (6, "12/s, cv 1"),
    ]  # fmt: skip
    for row in rows:
        assert (row["setting"], row["num_registered"], row["num_failed"]) == ("S1", 300, 0)
        assert row["num_used"] == min(row["num_adapters"], row["num_used"])
        assert row["new_tokens_per_s"] > 0 and row["of_base"] > 0 and row["attainment"] == 1.0
        assert 0 < row["ttft_ms_p50"] <= row["ttft_ms_p99"] and row["ttft_ms_mean"] > 0
        assert "paper" not in row, "the paper did not measure this model"
    assert rows[0]["of_base"] == rows[1]["of_base"] == 1.0
    assert rows[0]["new_tokens"] == rows[2]["new_tokens"]


@pytest.mark.long
def test_punica(tmp_path: Path) -> None:
    rows = bench(
        "punica", tmp_path / "out.jsonl", "--popularity", "distinct,base,identical",
        "--num-requests", "8", "--batches", "4", "--lora-modules", "all",
        engine=["--model", "tiny", "--device", "cpu", "--num-pages", "400"], num_notes=1,
    )  # fmt: skip
    assert [(row["popularity"], row["num_adapters"]) for row in rows] == [
        ("identical", 1), ("distinct", 8), ("base", 0),
    ]  # fmt: skip
    assert {row["max_num_seqs"] for row in rows} == {4}
    assert len({row["new_tokens"] for row in rows}) == 1
    assert rows[0]["of_identical"] == 1.0 and all(row["of_identical"] > 0 for row in rows)
    for row in rows:
        tokens = row["new_tokens"] + row["num_prompt_tokens"]
        assert row["all_tokens_per_s"] == pytest.approx(tokens / row["seconds"], rel=0.01)


@pytest.mark.long
def test_tiers(tmp_path: Path) -> None:
    rows = bench(
        "tiers", tmp_path / "out.jsonl", "--batch", "3", "--prompt-len", "8", "--answer-len",
        "150", "--samples", "1", "--probe-rate", "25", "--load-rate", "20", "--repeats", "1",
    )  # fmt: skip
    cases = [(row["part"], row["case"]) for row in rows]
    assert cases == [("ttft", t) for t in ("resident", "host", "disk", "new")] + [
        ("inter_token", case) for case in ("quiet", "warm", "loads")
    ]
    for row in rows[:4]:
        assert row["num_samples"] >= 1 and row["ttft_ms_p50"] > 0
    for row in rows[4:]:
        check_gaps(row["inter_token_ms_p50"], row["inter_token_ms_p99"])
    quiet, warm, loads = rows[4:]
    assert quiet["loads_per_s"] == warm["loads_per_s"] == 0
    assert loads["loads_per_s"] > 0
    assert {"p99_over_quiet", "p99_over_warm"} <= loads.keys()
