"""Answers of stores: how long they are remembered, and that no store holds others up."""

import select
import threading
from collections.abc import Callable, Iterator

import pytest

from loraplex.engine.errors import ClientError, QueueFullError, client_error
from loraplex.engine.ipc.channel import Wakeup
from loraplex.engine.store_config import StoreConfig
from loraplex.engine.stores import store_lookup
from loraplex.engine.stores.adapter_store import UNAVAILABLE, FolderLease, FoundAdapter
from loraplex.engine.stores.deadline import Deadline
from loraplex.engine.stores.store_lookup import Answer, StoreLookup
from loraplex.scheduler.frontend_protocol import AdapterSource

TTL_S = 10.0


class FakeStore:
    """Holds versions by name; counts what is asked and which leases are held."""

    root = "fake://"

    def __init__(self) -> None:
        self.versions: dict[str, str] = {}
        self.error: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.num_asked = 0
        self.num_reopened = 0
        self.num_held = 0
        self.is_cached = True

    def find(self, name: str, tenant: str, deadline: Deadline) -> FoundAdapter | None:
        self.num_asked += 1
        if tenant != "quick":
            self.gate.wait()
        if self.error is not None:
            raise self.error
        version = self.versions.get(name)
        return self._found(name, version) if version else None

    def _found(self, name: str, version: str) -> FoundAdapter:
        self.num_held += 1

        def release() -> None:
            self.num_held -= 1

        def again() -> FoundAdapter | None:
            self.num_reopened += 1
            return self._found(name, version) if self.is_cached else None

        source = AdapterSource(f"fake://{name}", f"/cache/{name}", version)
        return FoundAdapter(source, FolderLease(release), again)


class Lookup:
    """A StoreLookup with a clock that moves when told, and its answers."""

    def __init__(self, store: FakeStore) -> None:
        self.now = 100.0
        self.wakeup = Wakeup()
        self.lookup = StoreLookup(
            [store],
            StoreConfig(adapter_store_ttl_s=TTL_S, adapter_store_timeout_s=60),
            self.wakeup,
            clock=lambda: self.now,
        )

    def ask(self, name: str, tenant: str = "") -> list[Answer]:
        """Returns the list that the answer will be in."""
        answers: list[Answer] = []
        self.lookup.find(name, tenant, answers.append)
        return answers

    def run_until(self, is_done: Callable[[], bool]) -> None:
        while not is_done():
            assert select.select([self.wakeup.fileno()], [], [], 30)[0]
            self.wakeup.clear()
            self.lookup.run_ready()

    def get(self, name: str) -> Answer:
        answers = self.ask(name)
        self.run_until(lambda: bool(answers))
        return answers[0]

    def stamp(self, name: str) -> str:
        """Finds an adapter, and lets go of its files."""
        found = self.get(name)
        assert isinstance(found, FoundAdapter)
        assert found.lease is not None
        found.lease.release()
        return found.source.stamp


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def lookup(store: FakeStore) -> Iterator[Lookup]:
    lookup = Lookup(store)
    yield lookup
    store.gate.set()
    lookup.lookup.close()


def test_questions_about_one_name_share_a_lookup(store: FakeStore, lookup: Lookup) -> None:
    store.versions["x"] = "1"
    store.gate.clear()
    asked = [lookup.ask("x") for _ in range(50)]
    store.gate.set()
    lookup.run_until(lambda: all(asked))
    assert store.num_asked == 1
    assert store.num_held == 1  # one lease, with 50 holders
    for (answer,) in asked:
        assert isinstance(answer, FoundAdapter)
        assert answer.lease is not None
        answer.lease.release()
    assert store.num_held == 0


def test_a_lease_in_use_is_shared_at_once(store: FakeStore, lookup: Lookup) -> None:
    store.versions["x"] = "1"
    first = lookup.get("x")
    (second,) = lookup.ask("x")
    assert isinstance(first, FoundAdapter)
    assert isinstance(second, FoundAdapter)
    assert second.lease is first.lease
    assert first.lease is not None
    first.lease.release()
    assert store.num_held == 1
    first.lease.release()
    assert store.num_held == 0


def test_files_that_nobody_holds_are_opened_again_without_the_store(
    store: FakeStore, lookup: Lookup
) -> None:
    store.versions["x"] = "1"
    assert [lookup.stamp("x") for _ in range(3)] == ["1"] * 3
    assert (store.num_asked, store.num_reopened) == (1, 2)
    store.is_cached = False  # they have left the cache
    assert lookup.stamp("x") == "1"
    assert store.num_asked == 2
    assert store.num_held == 0


def test_what_is_not_there_is_remembered_for_a_while(store: FakeStore, lookup: Lookup) -> None:
    assert lookup.get("x") is None
    store.versions["x"] = "1"
    lookup.now += TTL_S - 0.1
    assert lookup.ask("x") == [None]
    assert store.num_asked == 1
    lookup.now += 0.2
    assert lookup.stamp("x") == "1"


def test_a_refused_adapter_is_remembered_a_store_that_failed_is_not(
    store: FakeStore, lookup: Lookup
) -> None:
    store.error = client_error("adapter", "no weights")
    assert str(lookup.get("x")) == str(lookup.ask("x")[0]) == "no weights"
    assert store.num_asked == 1
    for error in (client_error(UNAVAILABLE, "down"), RuntimeError("a fault")):
        store.error = error
        answer = lookup.get("y")
        assert isinstance(answer, ClientError)
        assert answer.code == UNAVAILABLE
    store.error = None
    store.versions["y"] = "1"
    assert lookup.stamp("y") == "1"


def test_an_old_answer_serves_while_a_new_one_is_looked_up(
    store: FakeStore, lookup: Lookup
) -> None:
    store.versions["x"] = "1"
    held = lookup.get("x")
    assert isinstance(held, FoundAdapter)
    store.versions["x"] = "2"
    lookup.now += TTL_S + 1
    store.gate.clear()
    (answer,) = lookup.ask("x")
    assert isinstance(answer, FoundAdapter)
    assert answer.source.stamp == "1"
    store.gate.set()
    lookup.run_until(lambda: not lookup.lookup.num_running)
    assert lookup.stamp("x") == "2"
    for old in (held, answer):
        assert old.lease is not None
        old.lease.release()
    assert store.num_held == 0


def test_an_adapter_in_use_outlives_a_store_that_is_down(store: FakeStore, lookup: Lookup) -> None:
    store.versions["x"] = "1"
    held = lookup.get("x")
    assert isinstance(held, FoundAdapter)
    store.error = client_error(UNAVAILABLE, "down")
    lookup.now += TTL_S + 1
    (answer,) = lookup.ask("x")
    assert isinstance(answer, FoundAdapter)
    lookup.run_until(lambda: not lookup.lookup.num_running)
    assert lookup.stamp("x") == "1"


def test_an_adapter_that_has_left_its_store_is_not_served(store: FakeStore, lookup: Lookup) -> None:
    store.versions["x"] = "1"
    assert lookup.stamp("x") == "1"
    del store.versions["x"]
    lookup.now += TTL_S + 1
    assert lookup.get("x") is None
    assert not lookup.lookup.has_found("x", "")


def test_one_name_that_hangs_delays_no_other(store: FakeStore, lookup: Lookup) -> None:
    store.versions |= {"x": "1", "y": "1"}
    assert lookup.stamp("y") == "1"
    store.gate.clear()
    waiting = lookup.ask("x")
    assert lookup.stamp("y") == "1"
    assert not waiting


def test_a_tenant_whose_names_hang_leaves_threads_to_others(
    store: FakeStore, lookup: Lookup
) -> None:
    store.versions |= {"x": "1"}
    store.gate.clear()
    slow = [lookup.ask(f"s{number}", "ann") for number in range(store_lookup.MAX_RUNNING)]
    full = [answers[0] for answers in slow if answers]
    assert len(full) == store_lookup.MAX_RUNNING // 2
    assert all(isinstance(answer, QueueFullError) for answer in full)
    answers = lookup.ask("x", "quick")
    lookup.run_until(lambda: bool(answers))
    assert isinstance(answers[0], FoundAdapter)
    store.gate.set()
    lookup.run_until(lambda: all(slow))
    assert not lookup.lookup.num_running


def test_names_are_bounded(
    store: FakeStore, lookup: Lookup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_lookup, "MAX_NAMES", 20)
    monkeypatch.setattr(store_lookup, "MAX_RUNNING", 30)
    for number in range(100):
        assert lookup.get(f"x{number}") is None
        assert lookup.lookup.num_names <= 20
    store.gate.clear()
    asked = [lookup.ask(f"y{number}") for number in range(40)]
    refused = [answers[0] for answers in asked if answers]
    assert len(refused) == 10
    assert all(isinstance(answer, QueueFullError) for answer in refused)
