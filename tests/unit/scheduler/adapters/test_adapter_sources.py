"""Names and folders: which version a request gets, as files change, are evicted and are read."""

from array import array

import pytest

from loraplex.scheduler.frontend_protocol import AdapterSource
from loraplex.scheduler.request import Request, RequestRefused
from loraplex.scheduler.worker_protocol import AdapterInspected, InspectAdapter

from helpers.fakes.fake_model import sampling_spec
from helpers.scheduling.expectation import Expectation
from helpers.scheduling.scheduler_harness import Harness


def ask(
    harness: Harness, number: int, stamp: str, path: str = "/p", *, load_inplace: bool = False
) -> Request:
    """Adds a request for "x" that brings the folder `path`."""
    request = Request(
        request_id=number,
        prompt_token_ids=array("i", [number]),
        sampling=sampling_spec(max_tokens=2),
        adapter="x",
        adapter_source=AdapterSource(path, path, stamp),
        load_inplace=load_inplace,
    )
    harness.scheduler.add(request)
    harness.expected[number] = Expectation([number], request.sampling, path)
    return request


def serve(harness: Harness, request: Request) -> str:
    """Runs until the request has ended. Returns the content that it was served with."""
    while harness.scheduler.num_unfinished:
        harness.now += 1
        planned = harness.scheduler.plan() if not harness.results else None
        harness.send_commands()
        if planned is not None:
            harness.results.append(harness.worker.step(planned))
        if harness.events:
            harness.deliver_event()
        elif harness.results:
            harness.scheduler.commit(harness.results.popleft())
    harness.scheduler.outputs.take()
    del harness.expected[request.request_id]
    return request.bindings[0].version.content_hash


def test_an_evicted_adapter_whose_files_were_overwritten() -> None:
    harness = Harness(max_adapter_slots=1)
    harness.worker.max_host = 0  # every load reads the files again
    harness.file("/p", "before")
    assert serve(harness, ask(harness, 1, "stamp 1")) == "before"
    harness.register("other")
    harness.add("evicts x", [1], adapter="other", max_tokens=1)
    harness.run()
    assert harness.resident() == {"other"}
    harness.file("/p", "after")
    assert serve(harness, ask(harness, 2, "stamp 2")) == "after"


def test_an_evicted_adapter_of_the_server_is_read_anew_after_one_error() -> None:
    harness = Harness(max_adapter_slots=1)
    harness.register("x", "before")
    harness.worker.max_host = 0
    path = harness.listed()["x"]["path"]
    harness.add("a", [1], adapter="x", max_tokens=1)
    harness.run()
    harness.register("other")
    harness.add("evicts x", [1], adapter="other", max_tokens=1)
    harness.run()
    harness.file(path, "after")
    harness.add("b", [1], adapter="x", max_tokens=1)
    harness.run()
    assert harness.error_of("b")[0] == "adapter"
    assert harness.listed()["x"]["error"], "the list shows why"
    harness.add("c", [1], adapter="x", max_tokens=1)
    harness.run()
    assert harness.listed()["x"]["content_hash"] == "after"
    assert harness.listed()["x"]["error"] == ""


def test_equal_stamps_are_read_once_and_a_failure_stays() -> None:
    harness = Harness()
    harness.file("/p", "", error="truncated")
    ask(harness, 1, "stamp 1")
    harness.settle()
    harness.scheduler.outputs.take()
    harness.file("/p", "good")
    with pytest.raises(RequestRefused, match="truncated"):
        ask(harness, 2, "stamp 1")
    assert serve(harness, ask(harness, 3, "stamp 2")) == "good"


def test_unread_files_that_change_are_read_once() -> None:
    harness = Harness()
    harness.file("/p", "good")
    harness.scheduler.register_adapter("x", AdapterSource("/p", "/p", "stamp 1"))
    first = ask(harness, 1, "stamp 2")
    commands = [c for c in harness.scheduler.take_commands() if isinstance(c, InspectAdapter)]
    assert commands == [InspectAdapter("x", "/p")]
    harness.scheduler.on_adapter_inspected(harness.worker.inspect(commands[0]))
    assert first.bindings[0].version is ask(harness, 2, "stamp 2").bindings[0].version


def test_two_reads_of_one_folder_are_never_under_way_at_a_time() -> None:
    """They could be answered in the wrong order, and the old content would stay for good."""
    harness = Harness()
    old, new = ask(harness, 1, "stamp 1"), ask(harness, 2, "stamp 2")
    for content in ("old", "new"):
        (command,) = harness.scheduler.take_commands()
        assert isinstance(command, InspectAdapter)
        event = AdapterInspected("x", "/p", content_hash=content, num_pages=1)
        harness.scheduler.on_adapter_inspected(event)
    assert harness.scheduler.take_commands() == []
    for request, content in ((old, "old"), (new, "new")):
        assert request.bindings[0].version.content_hash == content
    assert harness.listed()["x"]["content_hash"] == "new"


def test_a_name_under_another_folder_is_refused_or_replaced() -> None:
    harness = Harness()
    harness.file("/p", "one")
    harness.file("/q", "two")
    assert serve(harness, ask(harness, 1, "s")) == "one"
    with pytest.raises(RequestRefused, match="'x' is the folder /p, not /q") as refused:
        ask(harness, 2, "s", "/q")
    assert refused.value.code == "adapter"
    assert serve(harness, ask(harness, 3, "s", "/q", load_inplace=True)) == "two"
