"""A day of adapters over the real scheduler and the fake worker: clients, files and time.

Every choice is made by a seeded random generator. The model of what each name must answer with is
kept here, apart from the scheduler's own state.
"""

import random
from array import array
from dataclasses import dataclass, field
from typing import Any

import psutil

from loraplex.scheduler.adapters.version import AdapterState
from loraplex.scheduler.frontend_protocol import AdapterSource, SequenceOutput
from loraplex.scheduler.request import Request, RequestRefused
from loraplex.scheduler.worker_protocol import AdapterEvicted, StepPlan

from helpers.fakes.fake_model import sampling_spec
from helpers.scheduling.expectation import Expectation
from helpers.scheduling.scheduler_harness import Harness

NUM_NAMES = 2000
NUM_CONTENTS = 700  # so that names share contents
MAX_UNFINISHED = 100
MAX_WAIT_TURNS = 4000
NUM_SAMPLES = 40  # of the memory that the process holds
FAULTS = ("there is no adapter_model.safetensors", "it is damaged", "wrong shapes")
POLICIES: dict[str, dict[str, Any]] = {
    "fcfs": {},
    "cluster": {"max_adapters_per_batch": 4, "max_wait_s": 40.0},
    "vtc": {"fair_share_by": "adapter", "max_wait_s": 40.0},
}


def content_of(index: int) -> tuple[str, int]:
    """A content and its pages."""
    return f"content {index}", 1 + index % 5


@dataclass
class Asked(Expectation):
    content: str = ""  # that its name meant when it was added
    turn: int = 0


@dataclass
class Tally:
    """Events of a day."""

    counts: dict[str, int] = field(default_factory=dict)
    longest_wait: int = 0  # turns from arrival to end

    def add(self, key: str, count: int = 1) -> None:
        self.counts[key] = self.counts.get(key, 0) + count


class DayHarness(Harness):
    """Compares each result with the oracle as it comes, and forgets it then."""

    def __init__(self, policy: dict[str, Any]) -> None:
        super().__init__(
            policy=policy, num_pages=96, block_tokens=4, max_num_seqs=12, max_num_batched_tokens=48,
            max_steps_in_flight=2, max_adapter_slots=24, max_model_len=64, max_queue_len=500,
        )  # fmt: skip
        self.worker.max_host = 60
        self.turns = 0
        self.tally = Tally()
        self.contents: dict[str, str] = {}  # name -> what it means to a request that comes now
        self.loads: dict[int, tuple[str, str]] = {}  # reply key -> name and content
        self.unsound: set[str] = set()  # paths that may fail: broken, or written over

    def ask(self, request_id: int, prompt: list[int], adapter: str, **sampling: Any) -> None:
        """Raises RequestRefused, as Scheduler.add()."""
        spec = sampling_spec(**sampling)
        request = Request(request_id, array("i", prompt), spec, adapter=adapter)
        try:
            self.scheduler.add(request)
        finally:
            self.verify()
        version = request.bindings[0].version if request.bindings else None
        path = version.path if version else ""
        if version and version.state is not AdapterState.READY:
            self.contents[adapter] = self.files[path].content  # it is read anew
        self.expected[request_id] = Asked(
            prompt, spec, path, content=self.contents[adapter] if adapter else "", turn=self.turns
        )

    def plan(self) -> StepPlan | None:
        self.plans.clear()
        return super().plan()

    def content_of(self, expectation: Expectation) -> str:
        assert isinstance(expectation, Asked)
        return expectation.content

    def abort(self, request_id: Any) -> bool:
        alive = super().abort(request_id)
        if alive:
            self._forget(request_id, "abort")
        return alive

    def take_updates(self, outputs: list[SequenceOutput] | None = None) -> None:
        """An output of a request that has ended is a KeyError."""
        super().take_updates(outputs)
        for request_id, expectation in list(self.expected.items()):
            end = expectation.end
            if end is not None:
                if end.finish_reason == "error":
                    assert end.error_code in ("adapter", "bad_request"), end
                    failed = end.error_code == "adapter"
                    assert not failed or expectation.path in self.unsound, end
                self._forget(request_id, end.error_code or end.finish_reason)
        for key, reply in self.adapter_updates.items():
            if key in self.loads:
                name, content = self.loads.pop(key)
                self.tally.add("load refused" if reply.error else "loaded")
                if not reply.error:
                    self.contents[name] = content
            else:
                self.tally.add("pin refused" if reply.error else "pinned")
        self.adapter_updates.clear()

    def _forget(self, request_id: int, end: str) -> None:
        asked = self.expected.pop(request_id)
        self.tally.add(end)
        self.tally.longest_wait = max(self.tally.longest_wait, self.turns - asked.turn)


class FakeDay:
    """Random traffic: `run` draws a number of actions; `end` finishes and empties everything."""

    def __init__(self, policy: str, seed: int) -> None:
        self.rng = random.Random(seed)
        self.harness = DayHarness(POLICIES[policy])
        self.scheduler = self.harness.scheduler
        self.names = [f"adapter-{index:04d}" for index in range(NUM_NAMES)]
        self.num_asked = self.num_paths = self.num_keys = self.num_actions = 0
        self.harness.check = False
        for name in self.names:
            self._register(name)
        self.harness.check = True
        self.rss: list[int] = []

    def run(self, num_actions: int) -> None:
        actions = {
            self.ask: 12, self.turn: 30, self.abort: 0.8, self.load: 1.2, self.load_in_place: 0.4,
            self.register: 0.5, self.unload: 0.8, self.pin: 0.8, self.unpin: 0.3,
            self.break_file: 0.2, self.look: 0.1,
        }  # fmt: skip
        sample_every = max(1, num_actions // NUM_SAMPLES)
        while self.num_actions < num_actions:
            for action in self.rng.choices(list(actions), list(actions.values()), k=50):
                action()
                self.num_actions += 1
            oldest = min((asked.turn for asked in self._expected()), default=self.harness.turns)
            assert self.harness.turns - oldest < MAX_WAIT_TURNS, "a request starves"
            if self.num_actions // sample_every > len(self.rss):
                self.rss.append(psutil.Process().memory_info().rss)

    def end(self) -> None:
        """Serve what is left, unload every name; nothing may be left anywhere."""
        harness = self.harness
        harness.run()
        assert not harness.expected and not harness.loads
        stats = self.scheduler.stats()
        counts = harness.tally.counts
        ended = sum(counts.get(key, 0) for key in ("stop", "length", "abort", "adapter",
                                                   "bad_request"))  # fmt: skip
        assert ended == stats["num_requests"] == sum(stats["finished"].values())
        for service in (stats["adapter_usage"], stats["base_usage"]):
            assert service["num_requests"] == service["num_ended"]
            assert service["num_first_tokens"] == sum(service["hits"].values())
        assert stats["host_adapters"] == len(harness.worker.host)
        for info in harness.listed().values():
            self.scheduler.unload_adapter(info["name"])
            harness.verify()
        harness.settle()
        assert not harness.worker.host and not harness.worker.adapters
        stats = self.scheduler.stats()
        assert stats["pages_adapter"] == stats["host_adapters"] == 0
        assert not harness.listed()

    # Actions

    def turn(self) -> None:
        self.harness.turns += 1
        events = self.harness.events
        if self.rng.random() < 0.2 and not any(isinstance(e, AdapterEvicted) for e in events):
            events.rotate(self.rng.randrange(3))  # loads overtake each other
        self.harness.turn()

    def ask(self) -> None:
        rng = self.rng
        for _ in range(rng.choice([1, 1, 2, 8])):
            if len(self.harness.expected) >= MAX_UNFINISHED:
                return
            adapter = self._popular() if rng.random() < 0.92 else ""
            prompt = [rng.randrange(2) for _ in range(rng.randint(1, 14))]  # prefixes meet
            self.num_asked += 1
            try:
                self.harness.ask(
                    self.num_asked, prompt, adapter,
                    max_tokens=rng.choice([1, 2, 8, 24, 48]),
                    stop_token_ids=rng.choice([(), (3, 4, 5)]),
                )  # fmt: skip
            except RequestRefused as refusal:
                self.harness.tally.add(f"refused: {refusal.code}")
                if refusal.code == "unknown_adapter":
                    assert adapter not in self.harness.contents
                else:
                    assert refusal.code in ("adapter", "bad_request"), refusal

    def abort(self) -> None:
        if self.harness.expected:
            self.harness.abort(self.rng.choice(list(self.harness.expected)))

    def register(self) -> None:
        self._register(self.rng.choice(self.names))

    def load(self) -> None:
        name = self._popular()
        self._load(name, self._new_file())

    def load_in_place(self) -> None:
        """Other content at the same path, as a training run that saves again."""
        info = self._info(self._popular())
        is_loading = info and any(info["name"] == name for name, _ in self.harness.loads.values())
        if info and info["state"] == "ready" and not is_loading:
            self._write(info["path"])
            self._load(info["name"], info["path"])

    def unload(self) -> None:
        name = self._popular()
        try:
            self.scheduler.unload_adapter(name)
            del self.harness.contents[name]
            self.harness.tally.add("unloaded")
        except RequestRefused as refusal:
            assert refusal.code == "unknown_adapter" and name not in self.harness.contents
            self._register(name)  # it comes back later
        self.harness.verify()

    def pin(self) -> None:
        self.num_keys += 1
        try:
            self.scheduler.pin_adapter(self._popular(), self.num_keys)
        except RequestRefused as refusal:
            assert refusal.code in ("adapter", "unknown_adapter")
        self.harness.take_updates()
        self.harness.verify()

    def unpin(self) -> None:
        pinned = [info["name"] for info in self.harness.listed().values() if info["pinned"]]
        if pinned:
            assert not self.scheduler.unpin_adapter(self.rng.choice(pinned))["pinned"]
            self.harness.take_updates()
            self.harness.verify()

    def break_file(self) -> None:
        """A file that was good is gone; what needs it fails by name."""
        info = self._info(self._popular())
        if info:
            self.harness.files[info["path"]].error = self.rng.choice(FAULTS)
            self.harness.unsound.add(info["path"])

    def look(self) -> None:
        stats = self.scheduler.stats()
        assert len(self.harness.list_resident()) <= 24
        assert stats["pages_pinned"] <= stats["num_pages"] // 2
        assert stats["host_adapters"] <= 60 + len(self.harness.events)
        for info in self.harness.listed().values():
            assert info["num_requests"] == info["num_running"] + info["num_waiting"]
            if info["num_running"]:
                assert info["tier"] == "pages"

    # Parts of actions

    def _expected(self) -> list[Asked]:
        return [asked for asked in self.harness.expected.values() if isinstance(asked, Asked)]

    def _popular(self) -> str:
        return self.names[int(NUM_NAMES * self.rng.random() ** 5)]

    def _info(self, name: str) -> dict[str, Any] | None:
        try:
            return self.scheduler.adapters.describe_one(name)
        except RequestRefused:
            return None

    def _new_file(self) -> str:
        self.num_paths += 1
        path = f"/{self.num_paths}"
        self._write(path, error=self.rng.choice(FAULTS) if self.rng.random() < 0.06 else "")
        return path

    def _write(self, path: str, error: str = "") -> None:
        if error or path in self.harness.files:
            self.harness.unsound.add(path)
        self.harness.file(path, *content_of(self.rng.randrange(NUM_CONTENTS)), error)

    def _register(self, name: str) -> None:
        path = self._new_file()
        self.scheduler.register_adapter(name, AdapterSource.at(path))
        self.harness.contents[name] = self.harness.files[path].content
        self.harness.verify()

    def _load(self, name: str, path: str) -> None:
        info, self.num_keys = self._info(name), self.num_keys + 1
        content = self.harness.files[path].content
        self.harness.loads[self.num_keys] = (name, content)
        if info is None or info["state"] == "failed":
            self.harness.contents[name] = content  # new requests wait for it
        self.scheduler.load_adapter(name, AdapterSource.at(path), self.num_keys)
        self.harness.verify()
