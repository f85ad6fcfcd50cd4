"""Scale signals: one more when room runs short, one less when it lasts, and no flapping."""

import pytest

from loraplex.scheduler.placement.scaling import ScaleDecision, ScalePolicy

from helpers.scheduling.summaries import summary


def decide(
    policy: ScalePolicy, fills: list[float], now: float, **fields: float
) -> ScaleDecision | None:
    engines = [
        summary(f"e{i}", running=round(100 * fill), max_running=100, free_pages=50)
        for i, fill in enumerate(fills)
    ]
    options = {"num_starting": 0, "num_queued": 0, "attainment": 1.0} | fields
    return policy.decide(engines, now=now, **options)


def make(**fields: float) -> ScalePolicy:
    return ScalePolicy(**{"min_engines": 1, "max_engines": 4, "hold_s": 10.0} | fields)


def test_one_more_is_asked_for_when_room_runs_short() -> None:
    assert decide(make(), [0.9, 0.9], 0.0) is not None
    assert decide(make(), [0.9, 0.3], 0.0) is None
    assert decide(make(), [0.9, 0.3], 0.0, num_queued=1) is not None
    assert decide(make(), [0.9, 0.3], 0.0, attainment=0.9) is not None
    assert decide(make(), [0.9, 0.9], 0.0, num_starting=1) is None
    assert decide(make(max_engines=2), [0.9, 0.9], 0.0) is None


def test_the_emptiest_is_released_after_room_has_lasted() -> None:
    policy = make()
    fills = [0.9, 0.0, 0.1]
    assert decide(policy, fills, 0.0) is None
    assert decide(policy, [0.9, 0.8, 0.4], 5.0) is None  # the wait begins anew
    assert decide(policy, fills, 6.0) is None
    assert decide(policy, fills, 15.0) is None
    decision = decide(policy, fills, 16.0)
    assert decision is not None and decision.release == "e1"
    assert "3 engines, room for 2.00, 0 queued" in decision.reason


def test_the_least_number_of_engines_stays() -> None:
    policy = make(min_engines=2)
    assert not any(decide(policy, [0.0, 0.0], float(now)) for now in range(100))


@pytest.mark.parametrize("load", [0.3, 0.9, 1.4, 2.1])
def test_a_steady_load_changes_the_engines_until_it_fits_and_then_never(load: float) -> None:
    policy = make()
    num_engines, changes = 4, []
    for now in range(1000):
        fills = [min(1.0, max(0.0, load - i)) for i in range(num_engines)]
        decision = decide(policy, fills, float(now))
        if decision is not None:
            num_engines += -1 if decision.release else 1
            changes.append(now)
    assert load + 0.5 <= num_engines <= load + 2.0
    assert not changes or changes[-1] < 100


def test_bounds_that_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="min_engines"):
        make(min_engines=5)
