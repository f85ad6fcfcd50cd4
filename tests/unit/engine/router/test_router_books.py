"""No request is lost and none is answered twice, whatever happens to the engines."""

from array import array
from pathlib import Path
from random import Random
from typing import Any

import pytest
from msgspec.structs import replace

from loraplex.engine.ipc.messages.frontend import (
    AbortRequests,
    AdapterCommand,
    AdapterReply,
    StatsQuery,
    StatsReply,
)
from loraplex.engine.router.engine_watch import GIVE_UP_S, NO_ENGINE_S
from loraplex.scheduler.frontend_protocol import AdapterSource, AddRequest
from loraplex.scheduler.placement.placement import POLICIES
from loraplex.scheduler.request import RequestRefused

from helpers.fakes.fake_engine import expected_tokens, make_fake_adapter
from helpers.fakes.fake_model import sampling_spec
from helpers.running.routed_engines import RoutedEngines

NUM_ADAPTERS = 6


@pytest.fixture
def adapters(tmp_path: Path) -> list[AdapterSource]:
    folders = [make_fake_adapter(tmp_path / f"a{i}", f"content {i}") for i in range(NUM_ADAPTERS)]
    return [AdapterSource.at(str(folder)) for folder in folders]


def register(cluster: RoutedEngines, adapters: list[AdapterSource]) -> None:
    for i, source in enumerate(adapters):
        cluster.channel.send(AdapterCommand(i + 1, "load", f"a{i}", source, "owner"))
    while len(cluster.replies) < len(adapters):
        cluster.turn()
    assert not any(reply.error for reply in cluster.replies)


def ask(request_id: int, prompt: list[int], **fields: Any) -> AddRequest:
    names = AddRequest.__struct_fields__
    sampling = {key: fields.pop(key) for key in list(fields) if key not in names}
    return AddRequest(request_id, array("i", prompt), sampling_spec(**sampling), **fields)


class Chaos:
    """Does one thing after another to a cluster and knows every answer."""

    def __init__(self, cluster: RoutedEngines, random: Random) -> None:
        self.cluster, self.random = cluster, random
        self.asked: dict[int, tuple[list[int], str, int]] = {}
        self.aborted: set[int] = set()

    def add(self) -> None:
        random, request_id = self.random, len(self.asked)
        prompt = [random.randrange(300) for _ in range(random.randint(1, 40))]
        adapter, max_tokens = random.randrange(-1, NUM_ADAPTERS), random.randint(1, 30)
        name = "" if adapter < 0 else f"a{adapter}"
        content = "" if adapter < 0 else f"content {adapter}"
        self.asked[request_id] = (prompt, content, max_tokens)
        request = ask(request_id, prompt, adapter=name, max_tokens=max_tokens,
                      priority=random.choice([0, 0, 1]), num_logprobs=random.choice([-1, 0]),
                      num_prompt_logprobs=random.choice([-1, 0]))  # fmt: skip
        self.cluster.add(request)

    def abort(self) -> None:
        request_id = self.random.randrange(len(self.asked) + 1)
        outputs = self.cluster.outputs.get(request_id, [])
        if request_id in self.asked and not (outputs and outputs[-1].finish_reason):
            self.aborted.add(request_id)
            self.cluster.channel.send(AbortRequests(array("q", [request_id])))

    def one_of(self) -> str:
        return self.random.choice(sorted(self.cluster.channel.engine_ids))

    def kill(self) -> None:
        if len(self.cluster.channel.engine_ids) > 1:
            self.cluster.kill(self.one_of())

    def hang(self) -> None:
        if len(self.cluster.channel.engine_ids) - len(self.cluster.hung) > 1:
            self.cluster.hung.add(self.one_of())

    def wake(self) -> None:
        self.cluster.hung.clear()

    def drain(self) -> None:
        if len(self.cluster.channel.engine_ids) - len(self.cluster.hung) > 1:
            engine_id = self.one_of()
            self.cluster.channel.drain_engine(engine_id)
            self.cluster.hear()  # the requests go elsewhere before the engine hears of the drain
            self.cluster.turn()
            self.cluster.kill(engine_id)

    def start(self) -> None:
        if len(self.cluster.channel.engine_ids) < 5:
            self.cluster.start_engine()

    def check(self) -> None:
        for request_id, (prompt, content, max_tokens) in self.asked.items():
            outputs = self.cluster.outputs[request_id]
            if request_id in self.aborted:
                continue
            assert outputs[-1].finish_reason == "length", (request_id, outputs[-1:])
            expected = expected_tokens(prompt, content, max_tokens=max_tokens)
            assert list(self.cluster.tokens(request_id)) == expected
            scored = [entry.token_ids[0] for o in outputs for entry in o.prompt_logprobs]
            assert scored in ([], prompt[1:])
            drawn = [entry.token_ids[0] for o in outputs for entry in o.logprobs]
            assert drawn in ([], expected)


@pytest.mark.parametrize("placement", POLICIES)
@pytest.mark.parametrize("seed", range(3))
def test_random_failures_lose_nothing(
    placement: str, seed: int, adapters: list[AdapterSource]
) -> None:
    cluster = RoutedEngines(3, placement=placement, seed=seed)
    register(cluster, adapters)
    chaos = Chaos(cluster, Random(seed))
    weights = {
        chaos.add: 9, cluster.turn: 20, chaos.abort: 0.5, chaos.kill: 0.7, chaos.hang: 0.4,
        chaos.wake: 1, chaos.drain: 0.4, chaos.start: 1.2,
        lambda: cluster.turn(GIVE_UP_S / 3): 0.5,
    }  # fmt: skip
    for action in chaos.random.choices(list(weights), list(weights.values()), k=350):
        action()
    chaos.wake()
    cluster.finish()
    chaos.check()
    assert cluster.channel.book.num_moves > 0
    for engine in cluster.engines.values():
        engine.scheduler.check_integrity()


def test_an_engine_that_hangs_is_given_up_and_its_late_outputs_are_dropped() -> None:
    cluster = RoutedEngines(1)
    cluster.turn()
    cluster.add(ask(0, [1, 2, 3], max_tokens=20))
    for _ in range(5):
        cluster.turn()
    assert 0 < len(cluster.tokens(0)) < 20
    (first,) = cluster.channel.engine_ids
    cluster.hung.add(first)
    second = cluster.start_engine()
    for _ in range(10):
        cluster.turn(GIVE_UP_S / 8)
    assert cluster.channel.engine_ids == [second]
    cluster.finish()
    assert list(cluster.tokens(0)) == expected_tokens([1, 2, 3], max_tokens=20)
    assert cluster.channel.book.num_recomputed_tokens > 3


def test_requests_wait_for_an_engine_and_fail_only_after_a_long_time_without() -> None:
    cluster = RoutedEngines(0)
    cluster.add(ask(0, [1, 2, 3], max_tokens=4))
    cluster.turn(NO_ENGINE_S / 2)
    assert not cluster.outputs[0]
    cluster.start_engine()
    cluster.finish()
    assert list(cluster.tokens(0)) == expected_tokens([1, 2, 3], max_tokens=4)
    cluster.kill(cluster.channel.engine_ids[0])
    cluster.add(ask(1, [1, 2, 3], max_tokens=4))
    cluster.turn(NO_ENGINE_S + 1)
    assert cluster.outputs[1][-1].error_code == "engine_dead"


def test_a_request_reaches_an_engine_at_once() -> None:
    cluster = RoutedEngines(1)
    cluster.turn()
    cluster.add(ask(0, [1, 2, 3], max_tokens=4))
    (engine,) = cluster.engines.values()
    engine.turn()
    assert engine.scheduler.num_unfinished == 1


def test_requests_that_only_drained_engines_could_take_fail_after_a_long_time() -> None:
    cluster = RoutedEngines(1)
    cluster.turn()
    cluster.channel.drain_engine(cluster.channel.engine_ids[0])
    cluster.add(ask(0, [1, 2, 3], max_tokens=4))
    for _ in range(70):
        cluster.turn(1.0)
    assert cluster.outputs[0][-1].error_code == "engine_dead"


def test_new_engines_get_the_names_and_answers_are_merged(adapters: list[AdapterSource]) -> None:
    cluster = RoutedEngines(2)
    register(cluster, adapters[:1])
    third = cluster.start_engine()
    cluster.turn()
    for old in cluster.channel.engine_ids[:2]:
        cluster.kill(old)
    cluster.add(ask(0, [4, 5], adapter="a0", max_tokens=6))
    cluster.finish()
    assert list(cluster.tokens(0)) == expected_tokens([4, 5], "content 0", max_tokens=6)
    cluster.start_engine()
    cluster.replies.clear()
    cluster.channel.send(AdapterCommand(50, "list"))
    cluster.channel.send(StatsQuery(51, pool_cells=20))
    for _ in range(8):
        cluster.turn()
    (listed,) = [reply for reply in cluster.replies if isinstance(reply, AdapterReply)]
    (row,) = listed.adapters
    for engine in cluster.engines.values():  # of another tenant: the name is not its own
        with pytest.raises(RequestRefused):
            engine.scheduler.unload_adapter("a0", "somebody else")
    assert (row["name"], row["engines"]) == ("a0", [third])
    (reply,) = [reply for reply in cluster.replies if isinstance(reply, StatsReply)]
    assert reply.stats["num_requests"] == 1 and len(reply.stats["engines"]) == 2
    assert [pool.engine for pool in reply.pools] == sorted(cluster.channel.engine_ids)
    assert all(len(pool.owners) == 20 for pool in reply.pools)


def test_an_unknown_adapter_fails_and_a_bad_request_too() -> None:
    cluster = RoutedEngines(2)
    cluster.add(ask(0, [1], adapter="nobody"))
    cluster.add(replace(ask(1, [1] * 600), priority=1))
    cluster.finish()
    assert cluster.outputs[0][-1].error_code == "unknown_adapter"
    assert cluster.outputs[1][-1].error_code == "bad_request"
