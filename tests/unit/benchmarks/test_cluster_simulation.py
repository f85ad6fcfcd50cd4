"""The cluster's simulation: placement orders loads as it should, and moves lose nothing."""

import json
from pathlib import Path

import pytest

from loraplex.scheduler.config import SchedulerConfig
from loraplex.scheduler.placement.placement_policies import LATE_SHARE
from loraplex.scheduler.placement.scaling import ScalePolicy

from cluster_result import ClusterResult
from cluster_traces import day_rows, press, read_rows, slora_rows, with_adapters
from modelled_cluster import ClusterSpec, ModelledCluster
from sim_result import SimRequest

SEATS = 32


def run(trace: list[SimRequest], placement: str, *, scaled: bool = False) -> ClusterResult:
    spec = ClusterSpec(
        4,
        placement,
        SchedulerConfig(max_num_seqs=SEATS),
        2000,
        lambda adapter: 2,
        objective_s=2.0,
        scale=(lambda: ScalePolicy(min_engines=1, max_engines=4, hold_s=0.5)) if scaled else None,
        start_s=0.1,
        scale_every_s=0.1,
    )
    return ModelledCluster(spec, trace).run()


def num_new_tokens(trace: list[SimRequest]) -> int:
    return sum(request.num_new_tokens for request in trace)


def test_affinity_loads_less_than_random_and_answers_as_soon_as_least_loaded() -> None:
    short = [(at, prompt, 1 + new // 8) for at, prompt, new in slora_rows(80.0, 6.0)]
    trace = with_adapters(short, 500)
    runs = {name: run(trace, name) for name in ("affinity", "random", "least_loaded")}
    figures = {name: result.figures(2.0) for name, result in runs.items()}
    for result in runs.values():
        assert all(t.end_s is not None and not t.error_code for t in result.timelines)
        assert result.num_new_tokens == num_new_tokens(trace)
    distinct = len({request.adapter for request in trace})
    assert all(row["first_uses"] == distinct for row in figures.values())
    avoidable = {name: result.num_loads - distinct for name, result in runs.items()}
    assert 0 <= avoidable["affinity"] < avoidable["random"] / 3
    late_s = LATE_SHARE * 2.0
    assert figures["affinity"]["ttft_p99_s"] <= figures["least_loaded"]["ttft_p99_s"] + late_s
    assert figures["affinity"]["attainment"] >= figures["least_loaded"]["attainment"] - 0.01


def test_consolidation_uses_fewer_engines_and_loses_no_request_or_token() -> None:
    trace = with_adapters(day_rows(40.0, 20.0), 100)
    always_on = run(trace, "least_loaded")
    scaled = run(trace, "consolidate", scaled=True)
    assert all(t.end_s is not None and not t.error_code for t in scaled.timelines)
    assert scaled.num_new_tokens == num_new_tokens(trace)
    assert scaled.engine_seconds < 0.75 * always_on.engine_seconds
    assert scaled.figures(2.0)["attainment"] >= always_on.figures(2.0)["attainment"] - 0.01


def test_requests_of_an_engine_that_is_emptied_go_on_elsewhere() -> None:
    burst = [(0.0, prompt, new) for _, prompt, new in slora_rows(110.0, 1.0)]
    trace = with_adapters(burst, 100)
    result = run(trace, "least_loaded", scaled=True)
    assert result.num_moves > 0
    assert result.num_recomputed_tokens > 0
    assert all(t.end_s is not None and not t.error_code for t in result.timelines)
    assert result.num_new_tokens == num_new_tokens(trace)


def test_trace_files_of_both_kinds_are_read_and_pressed(tmp_path: Path) -> None:
    azure = tmp_path / "a.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.5,374,44\n2023-11-16 18:15:50.5,396,0\n"
    )
    assert read_rows(azure) == [(0.0, 374, 44), (4.0, 396, 1)]
    mooncake = tmp_path / "m.jsonl"
    rows = [{"timestamp": 1000 * i, "input_length": 10, "output_length": 2} for i in range(11)]
    mooncake.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pressed = press(read_rows(mooncake), rate=11.0, seconds=0.45)
    assert [at for at, _, _ in pressed] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4], abs=0.06)
    with pytest.raises(ValueError, match=r"\.csv \(Azure\) or \.jsonl"):
        read_rows(tmp_path / "x.txt")
