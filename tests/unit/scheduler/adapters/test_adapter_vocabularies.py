"""A prompt that was encoded by another vocabulary than its adapter's is refused, with that one."""

import pytest

from loraplex.scheduler.frontend_protocol import AdapterVocabulary
from loraplex.scheduler.request import Request, RequestRefused
from loraplex.scheduler.scheduler import Scheduler
from loraplex.scheduler.worker_protocol import AdapterInspected, int_array

from helpers.fakes.fake_model import sampling_spec
from helpers.scheduling.scheduler_harness import Harness


def request(number: int, vocabulary: str, adapter: str = "x") -> Request:
    return Request(
        request_id=number,
        prompt_token_ids=int_array([1, 2]),
        sampling=sampling_spec(),
        adapter=adapter,
        vocabulary=vocabulary,
    )


def inspect(scheduler: Scheduler, kind: str, num_tokens: int = 0) -> None:
    event = AdapterInspected("x", "/x/0", content_hash="c", num_pages=1, kind=kind)
    event.num_tokens = num_tokens
    scheduler.on_adapter_inspected(event)


@pytest.fixture
def scheduler() -> Scheduler:
    harness = Harness()
    harness.register("x")
    return harness.scheduler


def told(scheduler: Scheduler) -> dict[int, AdapterVocabulary | None]:
    return {
        output.request_id: output.vocabulary
        for _, outputs in scheduler.outputs.take()
        for output in outputs
    }


def test_a_request_that_waited_for_the_inspection(scheduler: Scheduler) -> None:
    scheduler.add(request(1, ""))
    scheduler.add(request(2, "?"))
    inspect(scheduler, "lora+tokens", 520)
    answers = told(scheduler)
    assert set(answers) == {1, 2} and answers[1] == answers[2]
    vocabulary = answers[1]
    assert vocabulary is not None
    assert (vocabulary.folder, vocabulary.num_tokens) == ("/x/0", 520)
    scheduler.add(request(3, vocabulary.key))
    assert not told(scheduler)
    with pytest.raises(RequestRefused) as refused:
        scheduler.add(request(4, ""))
    assert refused.value.vocabulary == vocabulary
    scheduler.check_integrity()


def test_adapters_without_token_rows_have_the_bases(scheduler: Scheduler) -> None:
    scheduler.add(request(1, ""))
    inspect(scheduler, "lora+head")
    scheduler.add(request(2, ""))
    scheduler.add(request(3, "", adapter=""))
    assert not told(scheduler)
    for number, vocabulary in ((4, "?"), (5, "of another version")):
        with pytest.raises(RequestRefused) as refused:
            scheduler.add(request(number, vocabulary))
        assert refused.value.vocabulary == AdapterVocabulary()
    scheduler.check_integrity()
