"""Placement: never on an engine that cannot take the request, and the policy's choice of others."""

from dataclasses import replace
from random import Random

import pytest

from loraplex.scheduler.placement.placement import POLICIES, place
from loraplex.scheduler.placement.placement_policies import (
    LATE_SHARE,
    LIGHT_FILL,
    LOAD_BOUND,
    NUM_CHOICES,
)
from loraplex.scheduler.placement.placement_request import PlacementRequest
from loraplex.scheduler.placement.rendezvous import rank_engines

from helpers.scheduling.summaries import SEATS, random_summary, summary


def chosen(request: PlacementRequest, engines: list, policy: str) -> str:
    decision = place(request, engines, policy, Random(0))
    assert decision is not None
    return decision.engine_id


@pytest.mark.parametrize("policy", POLICIES)
def test_only_engines_that_can_take_the_request_are_chosen(policy: str) -> None:
    random = Random(1)
    for _ in range(1000):
        engines = [random_summary(f"e{i}", random) for i in range(random.randint(0, 6))]
        request = PlacementRequest(f"a{random.randint(0, 99)}", 64, random.randint(1, 20))
        able = {
            e.engine_id
            for e in engines
            if e.age_seconds <= 1.0
            and not e.draining
            and e.running + e.waiting < SEATS
            and (
                e.running + e.waiting == 0 or e.free_pages - e.running - e.waiting >= request.pages
            )
        }
        decision = place(request, engines, policy, random)
        assert (decision is None) == (not able)
        assert decision is None or decision.engine_id in able


def test_an_engine_that_leaves_moves_only_its_own_adapters() -> None:
    engines = [f"e{i}" for i in range(16)]
    adapters = [f"hash{i}" for i in range(10_000)]
    before = {a: rank_engines(a, engines)[0] for a in adapters}
    after = {a: rank_engines(a, engines[1:])[0] for a in adapters}
    moved = {a for a in adapters if before[a] != after[a]}
    assert moved == {a for a in adapters if before[a] == "e0"}
    assert 0.8 / 16 < len(moved) / len(adapters) < 1.2 / 16


def test_affinity_keeps_to_a_holder_until_the_load_bound() -> None:
    for holder in ("e0", "e1", "e2", "e3"):
        engines = [summary(f"e{i}", cold_load_seconds=0.05) for i in range(4)]
        engines = [
            replace(e, load_seconds={"hash": 0.0}) if e.engine_id == holder else e for e in engines
        ]
        request = PlacementRequest("hash", 64, 1)
        assert chosen(request, engines, "affinity") == holder
        busy = [replace(e, running=6) if e.engine_id == holder else e for e in engines]
        assert chosen(request, busy, "affinity") != holder


def test_a_load_goes_to_the_soonest_of_the_first_engines_in_rendezvous_order() -> None:
    ranked = rank_engines("hash", [f"e{i}" for i in range(5)])
    request = PlacementRequest("hash", 64, 1)
    engines = [
        summary(key, waiting_tokens=120 - 5 * i, cold_load_seconds=0.05)
        for i, key in enumerate(ranked)
    ]
    assert chosen(request, engines, "affinity") == ranked[NUM_CHOICES - 1]
    assert chosen(replace(request, num_candidates=4), engines, "affinity") == ranked[3]


def test_an_adapter_with_fewer_holders_than_its_demand_needs_is_loaded_elsewhere() -> None:
    holder, other = rank_engines("hash", ["e0", "e1"])
    engines = [
        summary(holder, load_seconds={"hash": 0.0}, waiting_tokens=920),
        summary(other, waiting_tokens=900, cold_load_seconds=0.5),
    ]
    assert chosen(PlacementRequest("hash", 64, 1, 1), engines, "affinity") == holder
    assert chosen(PlacementRequest("hash", 64, 1, 2), engines, "affinity") == other


def test_affinity_loads_an_adapter_only_where_all_its_holders_are_busy() -> None:
    random = Random(4)
    for _ in range(1000):
        engines = [random_summary(f"e{i}", random) for i in range(8)]
        held = {"load_seconds": {"hash": 0.0}}
        engines = [replace(e, **held if random.random() < 0.3 else {}) for e in engines]
        able = [e for e in engines if not e.draining and e.age_seconds <= 1.0 and not e.is_full(2)]
        request = PlacementRequest("hash", 64, 2)
        decision = place(request, engines, "affinity", random)
        if decision is None or decision.load_seconds == 0.0:
            continue
        bound = max(LIGHT_FILL, LOAD_BOUND * sum(e.fill for e in able) / len(able))
        soonest = min(request.first_token_seconds(e) for e in able if e.fill <= bound)
        latest = soonest + LATE_SHARE * request.objective_s
        for holder in (e for e in able if e.load_seconds):
            assert holder.fill > bound or request.first_token_seconds(holder) > latest


def test_affinity_never_goes_beyond_the_load_bound() -> None:
    random = Random(2)
    for _ in range(1000):
        engines = [random_summary(f"e{i}", random) for i in range(8)]
        able = [e for e in engines if not e.draining and e.age_seconds <= 1.0 and not e.is_full(2)]
        if not able:
            continue
        request = PlacementRequest(f"a{random.random()}", 64, 2)
        name = chosen(request, engines, "affinity")
        engine = next(e for e in able if e.engine_id == name)
        bound = max(LIGHT_FILL, LOAD_BOUND * sum(e.fill for e in able) / len(able))
        assert engine.fill <= bound
        soonest = min(request.first_token_seconds(e) for e in able if e.fill <= bound)
        late = request.first_token_seconds(engine) - soonest
        assert late <= LATE_SHARE * request.objective_s


def test_affinity_keeps_to_one_engine_while_all_are_nearly_empty() -> None:
    engines = [summary(f"e{i}", running=0, max_running=100) for i in range(3)]
    holder = summary("e3", running=12, max_running=100, load_seconds={"hash": 0.0})
    assert chosen(PlacementRequest("hash", 64, 1), [*engines, holder], "affinity") == "e3"


def test_among_candidates_the_soonest_first_token_wins() -> None:
    ranked = rank_engines("hash", ["e0", "e1"])
    engines = [summary(ranked[0]), summary(ranked[1], load_seconds={"hash": 0.0})]
    decision = place(PlacementRequest("hash", 100, 1, 2), engines, "affinity", Random(0))
    assert decision is not None and decision.engine_id == ranked[1]
    assert decision.load_seconds == 0.0
    assert decision.first_token_seconds == pytest.approx(200 / 1000 + 1 / 50)


def test_the_base_model_goes_wherever_its_first_token_is_soonest() -> None:
    engines = [summary(f"e{i}", waiting_tokens=900 - 100 * i) for i in range(8)]
    assert chosen(PlacementRequest("", 64, 1), engines, "affinity") == "e7"


def test_consolidate_fills_the_busiest_engine_that_keeps_the_objective() -> None:
    engines = [
        summary("idle", running=0),
        summary("busy", running=5),
        summary("busier", running=6, waiting_tokens=8000),
        summary("full", running=8),
    ]
    assert chosen(PlacementRequest("", 64, 1), engines, "consolidate") == "busy"
    assert chosen(PlacementRequest("", 64, 1, objective_s=0.1), engines[2:], "consolidate") == (
        "busier"
    )


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(ValueError, match="unknown placement policy 'best'"):
        place(PlacementRequest("hash", 1, 1), [summary("e0")], "best", Random(0))
