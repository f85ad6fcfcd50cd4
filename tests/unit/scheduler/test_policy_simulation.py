"""The papers' orderings, by the real scheduler with a modelled worker, on short traces."""

import numpy as np
import pytest

from loraplex.entrypoints.bench.traces import make_trace
from loraplex.scheduler.config import SchedulerConfig

from modelled_worker import CostModel
from policy_figures import attainment, max_service_gap, vtc_bound
from sim_result import SimRequest, SimResult
from simulator import simulate

SEATS = 16


def config(policy: str, **options: object) -> SchedulerConfig:
    return SchedulerConfig(policy=policy, max_num_seqs=SEATS, **options)  # type: ignore[arg-type]


def trace_of(
    rate: float, seconds: float, *, tenant: str = "", **options: object
) -> list[SimRequest]:
    trace = make_trace(int(rate * seconds), rate=rate, lengths=(8, 128), **options)  # type: ignore[arg-type]
    return [
        SimRequest(r.arrival_s, r.num_prompt_tokens, r.num_new_tokens, r.adapter, tenant)
        for r in trace
    ]


def ttfts(result: SimResult) -> list[float]:
    return [timeline.ttft_s for timeline in result.timelines if timeline.ttft_s is not None]


def test_every_request_of_a_simulation_ends_once_and_time_adds_up() -> None:
    trace = trace_of(30, 5, num_adapters=10)
    result = simulate(trace, config=config("fcfs"), num_pages=2000)
    assert all(
        timeline.end_s is not None and not timeline.error_code for timeline in result.timelines
    )
    assert result.num_new_tokens == sum(request.num_new_tokens for request in trace)
    assert result.num_loads == len({request.adapter for request in trace})
    assert all(t > CostModel().fixed_s for t in ttfts(result))
    assert result == simulate(trace, config=config("fcfs"), num_pages=2000)


@pytest.mark.parametrize(("cv", "rate"), [(1.0, 110), (4.0, 75)])
def test_early_abort_beats_fcfs_under_bursts(cv: float, rate: float) -> None:
    trace = trace_of(rate, 10, num_adapters=20, cv=cv, seed=3)
    slo_s = 1.5
    runs = {
        name: simulate(trace, config=config(name, ttft_slo_s=slo_s), num_pages=4000)
        for name in ("fcfs", "abort")
    }
    fcfs, abort = (attainment(runs[name], slo_s) for name in ("fcfs", "abort"))
    assert abort > fcfs + 0.1
    assert np.mean(ttfts(runs["abort"])) < np.mean(ttfts(runs["fcfs"])) / 2
    served = [t <= slo_s for t in ttfts(runs["abort"])]
    assert np.mean(served) > 0.95, "what is not given up is in time"
    assert runs["abort"].num_new_tokens / runs["abort"].end_s > (
        0.9 * runs["fcfs"].num_new_tokens / runs["fcfs"].end_s
    ), "nor does the engine idle"


def test_early_abort_gives_up_nothing_when_there_is_room() -> None:
    trace = trace_of(20, 10, num_adapters=20, cv=1.0)
    result = simulate(trace, config=config("abort", ttft_slo_s=1.5), num_pages=4000)
    assert attainment(result, 1.5) == 1.0


@pytest.mark.parametrize(("weight", "ratio"), [("1", 1.0), ("3", 3.0)])
def test_vtc_bounds_the_service_gap_of_two_backlogged_tenants(weight: str, ratio: float) -> None:
    heavy = trace_of(160, 8, num_adapters=0, tenant="heavy")
    light = trace_of(60, 8, num_adapters=0, tenant="light", seed=4)
    trace = sorted(heavy + light, key=lambda request: request.arrival_s)
    bound = vtc_bound(trace, num_seats=SEATS)
    gaps = {}
    for name in ("fcfs", "vtc"):
        result = simulate(
            trace,
            config=config(name, fair_share_weights=(("heavy", weight),)),
            num_pages=4000,
        )
        gaps[name], seconds = max_service_gap(result, {"heavy": ratio, "light": 1.0})
        assert seconds > 7, "both are backlogged for most of the run"
    assert gaps["vtc"] <= bound
    if ratio == 1.0:
        assert gaps["fcfs"] > 2 * bound


def test_clustering_has_fewer_adapters_in_a_step_and_loads_fewer() -> None:
    trace = trace_of(75, 10, num_adapters=200, alpha=0.5)
    runs = {
        name: simulate(
            trace,
            config=config(name, max_adapters_per_batch=4),
            num_pages=200,
            adapter_pages=lambda adapter: 4,
        )
        for name in ("fcfs", "cluster")
    }
    fcfs, cluster = runs["fcfs"], runs["cluster"]
    assert np.mean(cluster.step_adapters) < 0.8 * np.mean(fcfs.step_adapters)
    assert cluster.num_loads < 0.8 * fcfs.num_loads
