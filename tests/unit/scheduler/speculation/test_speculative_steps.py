"""When a request verifies drafts, what the step takes for them, and what others notice of it."""

from array import array
from typing import Any

from loraplex.scheduler.speculation.draft_limits import MAX_SAMPLED, max_drafts
from loraplex.scheduler.speculation.speculation_config import SpeculationConfig
from loraplex.scheduler.worker_protocol import StepPlan

from helpers.scheduling.scheduler_harness import Harness

NGRAM = '{"method": "ngram", "num_speculative_tokens": 4}'


class RightDrafter:
    """Drafts the next tokens of the oracle's answer, from `first` tokens on."""

    def __init__(self, engine: Harness, name: str, first: int, count: int) -> None:
        self._engine, self._name = engine, name
        self._first, self._count = first, count

    def draft(self, token_ids: "array[int]") -> "array[int]":
        expectation = self._engine.expected[self._name]
        known = len(token_ids) - len(expectation.prompt)
        answer, _, _ = self._engine.oracle(expectation)
        return array("i", answer[known : known + self._count] if known >= self._first else [])


def make_engine(**options: Any) -> Harness:
    policy = {"speculative_config": NGRAM, **options.pop("policy", {})}
    return Harness(policy=policy, max_steps_in_flight=2, **options)


def add(engine: Harness, name: str, *, first: int = 1, count: int = 9, **options: Any) -> None:
    engine.add(name, [1, 2, 3, ord(name)], **{"max_tokens": 30, **options})
    request: Any = engine.requests[name]
    request.drafter = RightDrafter(engine, name, first, count)


def rows(engine: Harness, plan: StepPlan | None) -> dict[str, int]:
    """Returns the tokens that the plan's rows feed, by name."""
    by_slot = {r.slot: name for name, r in engine.requests.items()}
    return {by_slot[s]: n for s, n in zip(plan.slots, plan.num_tokens, strict=True)} if plan else {}


def test_a_request_is_planned_ahead_until_it_drafts() -> None:
    engine = make_engine()
    add(engine, "a", first=4)
    add(engine, "b", first=99)
    add(engine, "c", first=99)
    fed = []
    for _ in range(7):
        fed.append(rows(engine, engine.plan()))
        if len(engine.results) == 2:
            engine.commit()
    assert fed[:5] == [{"a": 4, "b": 4, "c": 4}, *4 * [{"a": 1, "b": 1, "c": 1}]]
    assert fed[5] == {"b": 1, "c": 1}  # a's last token is on its way
    assert fed[6] == {"b": 1, "c": 1, "a": 5}
    engine.run()


def test_an_accepted_draft_is_an_answer_of_several_tokens() -> None:
    engine = make_engine()
    add(engine, "a", num_logprobs=0)
    engine.plan()
    (first,) = engine.commit()
    engine.plan()
    (output,) = engine.commit()
    assert len(first.token_ids) == 1 and len(output.token_ids) == 5 == len(output.logprobs)
    stats = engine.scheduler.stats()
    assert (stats["num_drafted_tokens"], stats["num_accepted_tokens"]) == (4, 4)
    assert (stats["num_generated_tokens"], stats["num_dropped_tokens"]) == (6, 0)
    engine.run()
    assert engine.scheduler.stats()["num_steps"] < 10


def test_requests_that_all_draft_share_each_step() -> None:
    """Those that are ready wait for as many that are not, or both would go on in turns."""
    engine = make_engine()
    for name, first in (("a", 1), ("b", 2), ("c", 1), ("d", 2)):
        add(engine, name, first=first)
    fed: list[dict[str, int]] = []
    while engine.scheduler.num_unfinished:
        while (plan := engine.plan()) is not None:
            fed.append(rows(engine, plan))
        engine.commit()
    engine.check_all_ended()
    assert all(len(row) == 4 for row in fed[3:-1])
    assert len(fed) < 12


def test_drafts_take_what_other_rows_leave() -> None:
    """A prompt goes on as fast as without them; then the budget has no room for any."""
    num_steps = []
    for first in (1, 99):
        engine = make_engine(max_num_batched_tokens=12, max_num_seqs=4, max_model_len=400,
                             num_pages=200)  # fmt: skip
        add(engine, "a", first=first)
        engine.plan()
        engine.commit()
        engine.add("long", [n % 7 for n in range(90)], max_tokens=2)
        count = 0
        while not engine.expected["long"].token_ids:
            plan = engine.plan()
            assert plan is None or sum(plan.num_tokens) <= 12
            count += plan is not None and "long" in rows(engine, plan)
            if engine.results:
                engine.commit()
        num_steps.append(count)
        engine.run()
    assert num_steps[0] == num_steps[1]


def test_drafts_preempt_nobody() -> None:
    """The pool has a page for each request and one more."""
    engine = make_engine(num_pages=8, block_tokens=4, max_model_len=16, enable_prefix_caching=False)
    for name in "abc":
        add(engine, name, max_tokens=4)
    engine.run()
    assert engine.scheduler.stats()["num_preemptions"] == 0


def test_a_large_batch_drafts_less_and_then_nothing() -> None:
    config = SpeculationConfig("ngram", num_speculative_tokens=8)
    limits = {count: max_drafts(config, count) for count in (1, 8, 28, 29, 64, 85, 86, 256)}
    assert list(limits.values()) == [8, 8, 8, 7, 3, 2, 0, 0]
    assert all((1 + limit) * count <= MAX_SAMPLED for count, limit in limits.items())
    assert max_drafts(None, 1) == max_drafts(config, 0) == 0


def test_a_tenant_pays_for_each_accepted_token() -> None:
    """Under vtc the next request is that of the tenant which got fewer tokens, not fewer steps."""
    engine = make_engine(policy={"policy": "vtc"}, max_num_seqs=2)
    add(engine, "a", tenant="fast", max_tokens=20)
    add(engine, "b", tenant="slow", first=99, max_tokens=12)
    for name, tenant in (("x", "fast"), ("y", "slow")):
        engine.add(name, [1, 2, 3], tenant=tenant, max_tokens=9)
    order = []
    while engine.turn():
        order += [n for n in "xy" if engine.requests[n].admitted_at >= 0 and n not in order]
    assert order[0] == "y"
    engine.check_all_ended()
