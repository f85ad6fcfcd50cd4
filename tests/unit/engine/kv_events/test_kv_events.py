"""A subscriber to the events of the prefix cache knows exactly what the cache holds."""

import random
from typing import Any

import msgspec

from loraplex.engine.kv_events.events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventBatch,
    KVEvent,
)
from loraplex.engine.kv_events.kv_event_recorder import KVEventRecorder

from helpers.scheduling.scheduler_harness import Harness

BLOCK = 4
Key = tuple[bytes | None, tuple[int, ...], tuple[str, ...]]


class Subscriber:
    """Rebuilds the index of blocks from events alone, as they come over the wire."""

    def __init__(self, harness: Harness) -> None:
        self._recorder = KVEventRecorder(BLOCK)
        harness.scheduler.memory.kv.observer = self._recorder
        self.index: dict[Key, bytes] = {}

    def read(self) -> list[KVEvent]:
        data = msgspec.msgpack.encode(EventBatch(0.0, self._recorder.take()))
        events = msgspec.msgpack.decode(data, type=EventBatch).events
        for event in events:
            match event:
                case BlockStored():
                    self._store(event)
                case BlockRemoved():
                    gone = set(event.block_hashes)
                    assert gone <= set(self.index.values()), "removed and never stored"
                    self.index = {k: v for k, v in self.index.items() if v not in gone}
                case AllBlocksCleared():
                    self.index.clear()
        return events

    def _store(self, event: BlockStored) -> None:
        assert event.block_size == BLOCK and event.medium == "GPU"
        assert event.extra_keys is not None
        parent = event.parent_block_hash
        for number, key in enumerate(event.block_hashes):
            tokens = tuple(event.token_ids[number * BLOCK : (number + 1) * BLOCK])
            extra = tuple(event.extra_keys[number] or ())
            assert (event.lora_name in extra) or event.lora_name is None
            assert (parent, tokens, extra) not in self.index, "stored twice"
            self.index[parent, tokens, extra] = parent = key

    def num_cached(self, prompt: list[int], adapter: str, salt: str) -> int:
        """Predicts the tokens that a request will find; it computes at least one itself."""
        parent: bytes | None = None
        for number in range((len(prompt) - 1) // BLOCK):
            tokens = tuple(prompt[number * BLOCK : (number + 1) * BLOCK])
            extra = tuple(filter(None, (adapter, salt if not number else "")))
            found = self.index.get((parent, tokens, extra))
            if found is None:
                return number * BLOCK
            parent = found
        return (len(prompt) - 1) // BLOCK * BLOCK


def test_events_predict_what_each_request_finds() -> None:
    rng = random.Random(4)
    harness = Harness(num_pages=40, block_tokens=BLOCK, max_model_len=48)
    for name in ("a", "b"):
        harness.register(name)
    subscriber = Subscriber(harness)
    prompts = [[rng.randint(1, 9) for _ in range(rng.randint(6, 30))] for _ in range(4)]
    found = 0
    for number in range(80):
        prompt = rng.choice(prompts)[: rng.randint(5, 30)]
        options: dict[str, Any] = {"adapter": rng.choice(("", "a", "b"))}
        options["salt"] = rng.choice(("", "s"))
        expected = subscriber.num_cached(prompt, **options)
        harness.add(number, prompt, max_tokens=rng.randint(1, 8), **options)
        harness.run()
        assert harness.expected[number].num_cached_tokens == expected
        found += expected
        subscriber.read()
        if number == 60:
            harness.scheduler.memory.kv.reset()
            assert [type(event) for event in subscriber.read()] == [AllBlocksCleared]
            assert not subscriber.index
    assert found > 100
    stats = harness.scheduler.stats()
    assert stats["num_prefix_evictions"] > 0, "no block was removed to make room"


def test_blocks_of_one_prompt_are_one_event() -> None:
    harness = Harness(num_pages=40, block_tokens=BLOCK)
    subscriber = Subscriber(harness)
    harness.add(1, list(range(1, 14)), max_tokens=1, tenant="t")
    harness.run()
    (event,) = subscriber.read()
    assert isinstance(event, BlockStored)
    assert event.token_ids == list(range(1, 13))
    assert (event.parent_block_hash, event.lora_name) == (None, None)
    assert event.extra_keys == [("t",), None, None]


def test_a_batch_has_vllms_form() -> None:
    event = BlockStored([b"h"], None, [1, 2], 2, None, "GPU", "a", [("a",)])
    data = msgspec.msgpack.encode(EventBatch(1.5, [event, BlockRemoved([b"h"], "GPU")]))
    assert msgspec.msgpack.decode(data) == [
        1.5,
        [
            {
                "type": "BlockStored", "block_hashes": [b"h"], "parent_block_hash": None,
                "token_ids": [1, 2], "block_size": 2, "lora_id": None, "medium": "GPU",
                "lora_name": "a", "extra_keys": [["a"]],
            },
            {"type": "BlockRemoved", "block_hashes": [b"h"], "medium": "GPU"},
        ],
        0,
    ]  # fmt: skip
