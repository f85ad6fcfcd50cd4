"""LLMEngine over real processes and a worker without a model: steps, aborts, adapters by id."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex import LLM, LLMEngine, RequestOutput, SamplingParams
from loraplex.lora.request import LoRARequest
from loraplex.sampling_params import RequestOutputKind

from helpers.fakes.fake_engine import expected_tokens, make_fake_adapter
from helpers.fakes.fake_llm import start_llm

pytestmark = pytest.mark.e2e

PARAMS = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with start_llm() as made:
        yield made


@pytest.fixture
def engine(llm: LLM) -> Iterator[LLMEngine]:
    yield llm.llm_engine
    for lora_id in llm.llm_engine.list_loras():
        llm.llm_engine.remove_lora(lora_id)


def finished(engine: LLMEngine) -> dict[str, RequestOutput]:
    """Steps until nothing is left. Returns the last output of each request, by id."""
    last = {}
    while engine.has_unfinished_requests():
        last.update({output.request_id: output for output in engine.step()})
    assert all(output.finished for output in last.values())
    return last


def test_requests_join_between_steps(engine: LLMEngine, tmp_path: Path) -> None:
    adapters = [None] + [
        LoRARequest(name, number, make_fake_adapter(tmp_path / name, name))  # type: ignore[arg-type]
        for number, name in enumerate(("sql", "sql2"), start=1)
    ]
    waiting = [(str(i), [i + 1, 9], adapters[i % 3]) for i in range(9)]
    last: dict[str, RequestOutput] = {}
    while waiting or engine.has_unfinished_requests():
        if waiting:
            request_id, prompt, adapter = waiting.pop(0)
            engine.add_request(request_id, prompt, PARAMS, lora_request=adapter)
        last.update({output.request_id: output for output in engine.step()})
    assert engine.step() == []
    for i in range(9):
        content = ("", "sql", "sql2")[i % 3]
        want = expected_tokens([i + 1, 9], content, max_tokens=6)
        assert list(last[str(i)].outputs[0].token_ids) == want
        assert last[str(i)].finished


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_outputs_are_of_the_kind(engine: LLMEngine, kind: RequestOutputKind) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, output_kind=kind)
    engine.add_request("kind", {"prompt_token_ids": PROMPT}, params)
    seen: list[int] = []
    num = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens = list(output.outputs[0].token_ids)
            assert kind != RequestOutputKind.CUMULATIVE or tokens[: len(seen)] == seen
            seen = seen + tokens if kind == RequestOutputKind.DELTA else tokens
            num += 1
    assert seen == expected_tokens(PROMPT, max_tokens=6)
    assert kind != RequestOutputKind.FINAL_ONLY or num == 1


def test_an_aborted_request_returns_nothing_more(engine: LLMEngine) -> None:
    long = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
    engine.add_request("stays", PROMPT, PARAMS)
    engine.add_request("goes", PROMPT, long)
    engine.abort_request(["goes", "unknown"])
    assert engine.get_num_unfinished_requests() == 1
    assert set(finished(engine)) == {"stays"}


def test_a_refused_request_raises_and_the_others_go_on(engine: LLMEngine) -> None:
    engine.add_request("good", PROMPT, PARAMS)
    engine.add_request("bad", PROMPT, PARAMS, lora_request=LoRARequest("nobody", 9))
    outputs: list[RequestOutput] = []
    with pytest.raises(ValueError, match="nobody"):
        while engine.has_unfinished_requests():
            outputs += engine.step()
    outputs += finished(engine).values()
    assert list(outputs[-1].outputs[0].token_ids) == expected_tokens(PROMPT, max_tokens=6)


def test_wrong_arguments_send_nothing(engine: LLMEngine) -> None:
    with pytest.raises(TypeError, match="request_id"):
        engine.add_request(1, PROMPT, PARAMS)  # type: ignore[arg-type]
    engine.add_request("twice", PROMPT, PARAMS)
    with pytest.raises(ValueError, match="not finished"):
        engine.add_request("twice", PROMPT, PARAMS)
    assert set(finished(engine)) == {"twice"}


def test_adapters_by_their_integer_id(llm: LLM, engine: LLMEngine, tmp_path: Path) -> None:
    path = str(make_fake_adapter(tmp_path / "one", "one"))
    request = LoRARequest("one", 11, path)
    assert engine.add_lora(request)
    assert not engine.add_lora(request)
    assert engine.list_loras() == {11}
    assert engine.pin_lora(11)
    with pytest.raises(ValueError, match="no adapter has lora_int_id 12"):
        engine.pin_lora(12)
    with pytest.raises(ValueError, match="an id of its own"):
        engine.add_lora(LoRARequest("other", 11, path))
    other = str(make_fake_adapter(tmp_path / "other", "other"))
    assert engine.add_lora(LoRARequest("one", 11, other, load_inplace=True))
    (output,) = llm.generate([PROMPT], PARAMS, use_tqdm=False, lora_request=LoRARequest("one", 11))
    assert output.outputs[0].token_ids == expected_tokens(PROMPT, "other", max_tokens=6)
    assert engine.remove_lora(11)
    assert not engine.remove_lora(11)
    assert engine.list_loras() == set()


def test_a_batch_waits_for_no_steps(llm: LLM, engine: LLMEngine) -> None:
    engine.add_request("1", PROMPT, PARAMS)
    with pytest.raises(ValueError, match=r"call its step\(\)"):
        llm.generate([PROMPT], PARAMS, use_tqdm=False)
    finished(engine)
    (output,) = llm.generate([PROMPT], PARAMS, use_tqdm=False)
    assert output.finished
