"""`loraplex bench` over the tiny dummy model on the CPU, as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

COMMAND = [sys.executable, "-P", "-m", "loraplex.entrypoints.cli", "bench"]
TINY = ["--model", "tiny", "--device", "cpu", "--num-pages", "400", "--max-num-seqs", "8"]


def bench(kind: str, out: Path, *arguments: str) -> list[dict[str, Any]]:
    run = subprocess.run(
        [*COMMAND, kind, *TINY, "--ranks", "4,8", "--out", str(out), *arguments],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(run.stdout.splitlines()) == len(rows) + 1, run.stdout
    for row in rows:
        assert row["bench"] == kind
        assert (row["model"], row["device"], row["ranks"]) == ("tiny", "cpu", [4, 8])
        assert "TTFT" in row["measured"]
    return rows


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
        assert 0 < row["inter_token_ms_p50"] <= row["inter_token_ms_p99"]


def test_latency(tmp_path: Path) -> None:
    rows = bench(
        "latency", tmp_path / "out.jsonl", "--batches", "1,4", "--popularity", "base,distinct",
        "--prompt-len", "16", "--answer-len", "12", "--repeats", "2", "--lora-modules", "all",
    )  # fmt: skip
    assert [(r["batch"], r["num_adapters"]) for r in rows] == [(1, 0), (1, 1), (4, 0), (4, 4)]
    for row in rows:
        assert 0 < row["step_ms"] <= row["step_ms_p99"]
        assert row["new_tokens"] == row["batch"] * 12
        assert len(row["step_ms_of_runs"]) == 2


def test_serve(tmp_path: Path) -> None:
    (row,) = bench(
        "serve", tmp_path / "out.jsonl", "--rates", "15", "--duration", "1", "--num-adapters", "3",
        "--lengths", "4,24", "--ttft-objective", "60",
    )  # fmt: skip
    assert (row["num_requests"], row["num_failed"], row["first_failure"]) == (15, 0, None)
    assert row["attainment"] == 1.0
    assert row["seconds"] > 0.5  # an open loop waits for its arrivals
    assert 0 < row["ttft_ms_p50"] <= row["ttft_ms_p99"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["throughput", "--lengths", "9,9"], "LOW,HIGH"),
        (["latency", "--popularity", "odd"], "'odd' is none of"),
        (["serve", "--rates", "0"], "--rates"),
        (["throughput", "--out", "/nowhere/x.jsonl"], "/nowhere"),
        (["throughput", "--model", "/nowhere", "--num-adapters", "1"], "config.json"),
    ],
)
def test_bad_flags(arguments: list[str], message: str) -> None:
    run = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert message in run.stderr and "Traceback" not in run.stderr


def test_requests_beyond_the_context_are_refused() -> None:
    run = subprocess.run(
        [*COMMAND, "latency", *TINY, "--batches", "1", "--popularity", "base", "--answer-len",
         "1000"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 2
    assert "1128 tokens exceeds the engine's context of 1024" in run.stderr
