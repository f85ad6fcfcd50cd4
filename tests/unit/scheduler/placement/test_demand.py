"""Demand: candidates in proportion to an adapter's share, without flapping around a bound."""

from random import Random

import pytest

from loraplex.scheduler.placement.demand import AdapterDemand


def observe(demand: AdapterDemand, shares: dict[str, int], start: float, seconds: int) -> None:
    for second in range(seconds):
        for content_hash, num_tokens in shares.items():
            demand.observe(content_hash, num_tokens, start + second)


def test_candidates_grow_with_the_share() -> None:
    demand = AdapterDemand()
    observe(demand, {"half": 470, "tenth": 90, "rest": 430, "tail": 10}, 0.0, 300)
    assert demand.share("half") == pytest.approx(0.47)
    assert demand.num_candidates("half", 16) == 10  # 47 % of 16 engines and a quarter more
    assert demand.num_candidates("tenth", 16) == 2
    assert demand.num_candidates("tail", 16) == 1
    assert demand.num_candidates("unseen", 16) == 1
    assert demand.num_candidates("half", 1) == 1


def test_old_demand_is_forgotten() -> None:
    demand = AdapterDemand(half_life_s=10.0)
    observe(demand, {"old": 1000}, 0.0, 60)
    assert demand.num_candidates("old", 8) == 8
    observe(demand, {"new": 1000}, 60.0, 100)
    assert demand.num_candidates("old", 8) == 1
    observe(demand, {"new": 1000}, 400.0, 1)
    assert len(demand) == 1


def test_demand_around_a_bound_does_not_flap() -> None:
    random = Random(3)
    demand = AdapterDemand(half_life_s=20.0)
    counts = []
    for second in range(2000):
        share = 0.2 + random.uniform(-0.05, 0.05)  # 2 engines of 8, 1.5 to 2.5 with headroom
        demand.observe("hot", round(1000 * share), float(second))
        demand.observe("rest", round(1000 * (1 - share)), float(second))
        counts.append(demand.num_candidates("hot", 8))
    steady = counts[200:]
    changes = sum(a != b for a, b in zip(steady, steady[1:], strict=False))
    assert changes <= 1
    assert steady[-1] in (2, 3)
