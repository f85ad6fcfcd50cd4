"""A router sends a mix again with the folders that its adapters meant when it came."""

from array import array

from loraplex.engine.router.request_book import RequestBook
from loraplex.scheduler.frontend_protocol import AdapterSource, AddRequest, MixPart

from helpers.fakes.fake_model import sampling_spec

THEN = {name: AdapterSource.at(f"/then/{name}") for name in "ab"}
GIVEN = AdapterSource.at("/given")


def test_sources_of_a_mix() -> None:
    parts = [MixPart("a", 0.5), MixPart("b", 2.0, GIVEN), MixPart("c", -1.0)]
    message = AddRequest(7, array("i", [1, 2]), sampling_spec(), adapter="a+b+c", mix=parts)
    assert message.home_adapter == "a"
    book = RequestBook()
    book.add(message, 0.0, THEN.get)
    request = book.first_waiting()
    assert request is not None
    first = book.start(request, "engine 1")
    assert first.mix == parts, "the first engine gets what the client sent"
    book.recall("engine 1")
    again = book.first_waiting()
    assert again is request
    second = book.start(again, "engine 2")
    assert [part.source for part in second.mix] == [THEN["a"], GIVEN, None]
    assert [part.weight for part in second.mix] == [0.5, 2.0, -1.0]
    assert second.adapter_source is None and second.parts == second.mix
    book.check_integrity()
