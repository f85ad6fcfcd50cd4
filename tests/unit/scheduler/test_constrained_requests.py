"""A constrained request is planned once its mask is there; others look ahead as before."""

from array import array

import pytest

from helpers.scheduling.scheduler_harness import Harness


class Masks:
    """A constraint whose masks the test makes."""

    def __init__(self) -> None:
        self.mask: array[int] | None = array("i", [7])
        self.draft_masks: list[array[int]] = []
        self.taken: list[int] = []

    def advance(self, token_ids: "array[int]", drafts: "array[int]") -> None:
        self.mask = None
        self.taken += token_ids

    def ready(self) -> None:
        self.mask = array("i", [len(self.taken)])


def add(engine: Harness, name: str, prompt: list[int], max_tokens: int = 6) -> Masks:
    engine.add(name, prompt, max_tokens=max_tokens)
    masks = engine.requests[name].constraint = Masks()
    return masks


def rows(engine: Harness) -> dict[str, int | None]:
    """Plan a step. Returns the mask of each row by its request's name, None for a free row."""
    plan = engine.plan()
    if plan is None:
        return {}
    masks = dict(zip(plan.masked_rows, plan.masks, strict=True))
    by_slot = {request.slot: name for name, request in engine.requests.items()}
    return {by_slot[slot]: masks.get(row) for row, slot in enumerate(plan.slots)}


def test_a_constrained_row_waits_for_its_token_and_its_mask() -> None:
    engine = Harness(max_steps_in_flight=2)
    masks = add(engine, "bound", [1, 2, 3])
    engine.add("free", [4, 5], max_tokens=6)
    assert rows(engine) == {"bound": 7, "free": None}
    assert rows(engine) == {"free": None}  # looks ahead
    engine.commit()
    assert masks.taken == engine.expected["bound"].token_ids
    assert rows(engine) == {"free": None}  # the mask is not there yet
    masks.ready()
    engine.commit()
    assert rows(engine) == {"free": None, "bound": 1}


def test_a_step_needs_no_row_while_masks_are_computed() -> None:
    engine = Harness(max_steps_in_flight=2)
    masks = add(engine, "bound", [1, 2, 3], max_tokens=2)
    assert rows(engine) == {"bound": 7}
    engine.commit()
    assert rows(engine) == {}
    assert engine.scheduler.num_unfinished == 1
    masks.ready()
    assert rows(engine) == {"bound": 1}
    engine.commit()
    engine.check_all_ended()
    assert len(masks.taken) == 1  # no mask is wanted after the last token


def test_a_preempted_request_resumes_with_the_mask_of_its_last_token() -> None:
    engine = Harness(num_pages=9, block_tokens=4, max_steps_in_flight=2, max_model_len=32)
    names = ["a", "b"]
    masks = {name: add(engine, name, [1, 2, 3, ord(name)], max_tokens=14) for name in names}
    masks |= {"c": add(engine, "c", [9, 9, 9], max_tokens=14)}
    for _ in range(200):
        if not engine.scheduler.num_unfinished:
            break
        engine.turn()
        for one in masks.values():
            if one.mask is None:
                one.ready()
    engine.check_all_ended()
    assert engine.scheduler.stats()["num_preemptions"] > 0
    for name, one in masks.items():
        assert one.taken == engine.expected[name].token_ids[:-1]


def test_waiting_for_a_mask_is_no_fault_of_the_engine() -> None:
    engine = Harness(max_steps_in_flight=2)
    masks = add(engine, "bound", [1, 2, 3])
    masks.mask = None
    assert rows(engine) == {}
    assert engine.expected["bound"].end is None
    masks.ready()
    assert rows(engine) == {"bound": 0}


@pytest.mark.parametrize("started", [False, True])
def test_a_request_without_a_mask_can_be_failed(started: bool) -> None:
    engine = Harness()
    add(engine, "bound", [1, 2, 3])
    if started:
        engine.plan()
    engine.scheduler.fail(engine.requests["bound"].uid, "bad_request", "too complex")
    engine.take_updates()
    assert engine.error_of("bound") == ("bad_request", "too complex")
