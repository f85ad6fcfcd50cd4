"""Routers of one cluster know the adapters that clients have told any of them."""

from pathlib import Path

from loraplex.engine.ipc.messages.frontend import AdapterCommand
from loraplex.engine.router.adapter_book import AdapterBook
from loraplex.engine.router.adapter_log import AdapterLog
from loraplex.scheduler.frontend_protocol import AdapterSource


def load(name: str, path: str) -> AdapterCommand:
    return AdapterCommand(1, "load", name, AdapterSource(path, path, "stamp"), "tenant")


def names(book: AdapterBook) -> list[tuple[str, str]]:
    return [(command.op, command.name) for command in book.replay(-1)]


def test_a_router_repeats_what_another_was_told(tmp_path: Path) -> None:
    one, other = (AdapterBook(AdapterLog(tmp_path / "log")) for _ in range(2))
    one.on_done(load("a", "/a"))
    other.on_done(load("b", "/b"))
    one.on_done(AdapterCommand(2, "pin", "b"))
    for book in (one, other):
        assert names(book) == [("register", "a"), ("register", "b"), ("pin", "b")]
    other.on_done(AdapterCommand(3, "unload", "b"))
    other.on_done(load("a", "/elsewhere"))
    one.sync()
    assert names(one) == [("register", "a")]
    assert one.source("a") == other.source("a") == load("a", "/elsewhere").source


def test_a_router_that_starts_again_knows_what_the_former_one_was_told(tmp_path: Path) -> None:
    former = AdapterBook(AdapterLog(tmp_path / "log"))
    former.on_done(load("a", "/a"))
    former.on_done(AdapterCommand(2, "pin", "a"))
    later = AdapterBook(AdapterLog(tmp_path / "log"))
    assert names(later) == [("register", "a"), ("pin", "a")]


def test_a_command_that_changes_nothing_takes_no_room(tmp_path: Path) -> None:
    book = AdapterBook(AdapterLog(tmp_path / "log"))
    book.on_done(load("a", "/a"))
    size = (tmp_path / "log").stat().st_size
    for command in (
        load("a", "/a"),
        AdapterCommand(2, "list", "a"),
        AdapterCommand(3, "unpin", "a"),
    ):
        book.on_done(command)
    assert (tmp_path / "log").stat().st_size == size
