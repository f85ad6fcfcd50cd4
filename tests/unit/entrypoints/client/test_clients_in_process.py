"""The client over the whole engine in one thread: real frontend and scheduler, fake worker."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loraplex.engine.config import AdapterConfig, ModelConfig, ServerConfig
from loraplex.engine.errors import (
    ClientError,
    EngineDeadError,
    QueueFullError,
    UnknownAdapterError,
)
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.entrypoints.client.outputs import RequestFailure, RequestOutput
from loraplex.scheduler.config import SchedulerConfig

from helpers.fakes.fake_engine import NUM_PAGES, expected_tokens, make_fake_adapter
from helpers.fakes.in_process_client import TEN, InProcessClient, last
from helpers.models.hf_models import make_tokenizer


def test_without_streaming_there_is_one_output(client: InProcessClient) -> None:
    (output,) = client.generate({"prompt_token_ids": [1, 2, 3]}, TEN, stream=False)
    assert output.outputs[0].token_ids == expected_tokens([1, 2, 3], max_tokens=10)


def test_submit_and_poll_mix_with_everything_else(client: InProcessClient) -> None:
    prompts = {client.submit([1, 2, i], TEN): [1, 2, i] for i in range(100)}
    assert client.num_outstanding == 100
    streamed = client.generate([9], TEN, stream=True)
    next(streamed)
    assert client.health()["status"] == "ok"
    done: dict[str, Any] = {}
    while client.num_outstanding:
        for result in client.poll(5.0):
            assert isinstance(result, RequestOutput)
            assert result.request_id not in done
            done[result.request_id] = result
    assert client.poll() == []
    for request_id, prompt in prompts.items():
        assert done[request_id].finished
        assert done[request_id].outputs[0].token_ids == expected_tokens(prompt, max_tokens=10)
    assert last(streamed).outputs[0].token_ids == expected_tokens([9], max_tokens=10)


def test_poll_returns_partial_outputs_of_streams(client: InProcessClient) -> None:
    client.submit([1], TEN, stream=True)
    lengths = []
    while client.num_outstanding:
        lengths += [len(result.outputs[0].token_ids) for result in client.poll(5.0)]  # type: ignore[union-attr]
    assert len(lengths) > 2
    assert lengths[-1] == 10


def test_leaving_the_loop_cancels(client: InProcessClient) -> None:
    stream = client.generate([1], SamplingParams(max_tokens=400))
    next(stream)
    stream.close()
    stats = client.stats()
    assert stats["running"] == 0
    assert stats["finished"]["abort"] == 1
    assert stats["pages_kv"] == 0


def test_cancel_ends_with_what_there_is(client: InProcessClient) -> None:
    request_id = client.submit([1], SamplingParams(max_tokens=400), stream=True)
    client.poll()
    client.cancel(request_id)
    client.cancel("never heard of")
    results: list[Any] = []
    while client.num_outstanding:
        results += client.poll(5.0)
    assert results[-1].outputs[0].finish_reason == "abort"
    assert 0 < len(results[-1].outputs[0].token_ids) < 400
    stats = client.stats()
    assert stats["pages_kv"] == 0
    assert stats["pages_free"] + stats["pages_prefix"] == NUM_PAGES - 1


def test_several_answers(client: InProcessClient) -> None:
    output = last(client.generate([1, 2], replace(TEN, n=3)))
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    for completion in output.outputs:
        assert completion.token_ids == expected_tokens([1, 2], max_tokens=10)
        assert completion.finish_reason == "length"


def test_logprobs_have_vllms_form(client: InProcessClient) -> None:
    params = SamplingParams(max_tokens=3, logprobs=0, prompt_logprobs=0, temperature=0.0)
    output = last(client.generate([1, 2, 3], params))
    (completion,) = output.outputs
    assert completion.logprobs is not None
    assert [list(entry) for entry in completion.logprobs] == [[t] for t in completion.token_ids]
    assert completion.logprobs[0][completion.token_ids[0]].logprob == -1.0
    assert completion.cumulative_logprob == -3.0
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert [list(entry or ()) for entry in output.prompt_logprobs[1:]] == [[2], [3]]


def test_prefix_hits_are_reported(client: InProcessClient) -> None:
    prompt = list(range(40))
    assert last(client.generate(prompt, TEN)).num_cached_tokens == 0
    assert last(client.generate(prompt, TEN)).num_cached_tokens == 32
    assert last(client.generate(prompt, TEN, salt="tenant")).num_cached_tokens == 0


def test_failures_are_results_of_their_requests(client: InProcessClient) -> None:
    good = client.submit([1], TEN)
    bad = client.submit([1], TEN, adapter="nobody")
    worse = client.submit([99999], TEN)
    ends: dict[str, Any] = {}
    while client.num_outstanding:
        ends |= {result.request_id: result for result in client.poll(5.0)}
    assert isinstance(ends[good], RequestOutput)
    assert isinstance(ends[bad], RequestFailure)
    assert isinstance(ends[bad].error, UnknownAdapterError)
    assert ends[worse].error.code == "bad_request"


def test_a_full_queue_refuses_by_name(tmp_path: Path) -> None:
    scheduler = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=64, max_queue_len=2)
    with InProcessClient(scheduler=scheduler) as client:
        ids = [client.submit([1, i], TEN) for i in range(10)]
        ends: dict[str, Any] = {}
        while client.num_outstanding:
            ends |= {result.request_id: result for result in client.poll(5.0)}
        refused = [i for i in ids if isinstance(ends[i], RequestFailure)]
        assert refused
        assert all(isinstance(ends[i].error, QueueFullError) for i in refused)
        assert len(ids) - len(refused) >= 2


@pytest.mark.parametrize("prompt", [5, b"x", None, {"text": "x"}, [1.5]])
def test_prompts_of_no_known_form_are_refused_before_sending(
    client: InProcessClient, prompt: Any
) -> None:
    with pytest.raises((TypeError, ValueError)):
        client.submit(prompt, TEN)
    assert client.num_outstanding == 0


def test_ids_of_the_callers_choice(client: InProcessClient) -> None:
    assert client.submit([1], TEN, request_id="mine") == "mine"
    with pytest.raises(ValueError, match="not finished"):
        client.submit([1], TEN, request_id="mine")
    (result,) = client.poll(5.0)
    assert result.request_id == "mine"
    client.submit([1], TEN, request_id="mine")


def test_a_wait_can_be_bounded(client: InProcessClient) -> None:
    client.submit([1], SamplingParams(max_tokens=400))
    assert client.poll(0.0) == []
    stream = client.generate([2], SamplingParams(max_tokens=400), stream=False, timeout_s=0.0)
    with pytest.raises(TimeoutError, match="no output"):
        next(stream)
    assert client.stats()["finished"]["abort"] == 1


def test_text_goes_in_and_comes_out(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer")
    model = ModelConfig(model=str(tmp_path / "tokenizer"))
    with InProcessClient(model=model) as client:
        health = client.health()
        assert (health["tokenizer"], health["chat_template"]) == (True, True)
        params = SamplingParams(max_tokens=30, ignore_eos=True)
        whole = last(client.generate("hello there", params))
        assert whole.prompt == "hello there"
        assert whole.prompt_token_ids is not None
        assert whole.outputs[0].token_ids == expected_tokens(whole.prompt_token_ids, max_tokens=30)
        text = whole.outputs[0].text
        assert len(text) > 10
        stop = text[6:9]
        cut = text.index(stop)
        stopped = last(client.generate("hello there", replace(params, stop=[stop])))
        assert stopped.outputs[0].text == text[:cut]
        assert stopped.outputs[0].stop_reason == stop
        once = last(client.generate("hello there", params, stream=False))
        assert once.outputs[0].text == text
        chat = last(client.chat([{"role": "user", "content": "hi"}], params))
        assert chat.prompt_token_ids is not None
        assert chat.outputs[0].token_ids == expected_tokens(chat.prompt_token_ids, max_tokens=30)
        assert client.stats()["pages_kv"] == 0


def test_a_closed_engine_says_so() -> None:
    client = InProcessClient()
    client.close()
    client.close()
    with pytest.raises(EngineDeadError):
        client.submit([1], TEN)


def test_adapters_at_InProcessClient(tmp_path: Path) -> None:
    make_fake_adapter(tmp_path / "all" / "pirate", "arr")
    with InProcessClient(adapter=AdapterConfig(adapter_dir=str(tmp_path / "all"))) as client:
        (listed,) = client.list_adapters()
        assert listed["name"] == "pirate"
        output = last(client.generate([1, 2], TEN, adapter="pirate"))
        assert output.outputs[0].token_ids == expected_tokens([1, 2], "arr", max_tokens=10)
        with pytest.raises(ClientError, match="adapter_root"):
            client.load_adapter("x", str(tmp_path / "all" / "pirate"))


def test_server_limits_hold_in_process() -> None:
    with InProcessClient(server=ServerConfig(max_requests_per_client=1)) as client:
        client.submit([1], TEN)
        client.submit([2], TEN)
        codes = []
        while client.num_outstanding:
            results = client.poll(5.0)
            codes += [r.error.code for r in results if isinstance(r, RequestFailure)]
        assert codes == ["too_many_requests"]
