"""Streams with each RequestOutputKind through a whole engine with a fake worker."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loraplex.engine.config import ModelConfig
from loraplex.engine.frontend.sampling_params import RequestOutputKind, SamplingParams
from loraplex.entrypoints.client.outputs import CompletionOutput, RequestOutput

from helpers.fakes.in_process_client import TEN, InProcessClient, last
from helpers.models.hf_models import make_tokenizer

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind

CASES: list[dict[str, Any]] = [
    {},
    {"n": 3, "temperature": 1.0, "seed": 5},
    {"logprobs": 1, "prompt_logprobs": 0},
    {"n": 2, "logprobs": 0, "prompt_logprobs": 1},
]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(path)
    return path


def join(outputs: list[RequestOutput]) -> list[CompletionOutput]:
    """Assembles completions from deltas, independently of the client."""
    joined: dict[int, CompletionOutput] = {}
    for output in outputs:
        for delta in output.outputs:
            so_far = joined.setdefault(delta.index, CompletionOutput(delta.index))
            assert so_far.finish_reason is None, "a finished completion came again"
            so_far.text += delta.text
            so_far.token_ids = [*so_far.token_ids, *delta.token_ids]
            if delta.logprobs is not None:
                so_far.logprobs = [*(so_far.logprobs or ()), *delta.logprobs]
            so_far.cumulative_logprob = delta.cumulative_logprob
            so_far.finish_reason, so_far.stop_reason = delta.finish_reason, delta.stop_reason
    return [joined[index] for index in sorted(joined)]


@pytest.mark.parametrize("values", CASES)
def test_every_kind_tells_the_same(client: InProcessClient, values: dict[str, Any]) -> None:
    params = replace(TEN, **values)
    results = {
        kind: list(client.generate([1, 2, 3], replace(params, output_kind=kind)))
        for kind in RequestOutputKind
    }
    whole = results[CUMULATIVE][-1]
    assert len(results[CUMULATIVE]) == len(results[DELTA]) > 2
    assert [len(c.token_ids) for c in whole.outputs] == [10] * params.n
    assert join(results[DELTA]) == whole.outputs
    (final,) = results[FINAL_ONLY]
    assert final.outputs == whole.outputs
    for outputs in results.values():
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        assert all(output.prompt_token_ids == [1, 2, 3] for output in outputs)
        assert outputs[-1].num_cached_tokens is not None
    scores = whole.prompt_logprobs
    assert (scores is not None and len(scores) == 3) == (params.prompt_logprobs is not None)
    assert final.prompt_logprobs == scores
    assert [output.prompt_logprobs for output in results[DELTA]] == (
        [scores] + [None] * (len(results[DELTA]) - 1)
    )
    assert all(output.prompt_logprobs == scores for output in results[CUMULATIVE])


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_end_every_kind_alike(tokenizer_path: Path, include: bool) -> None:
    with InProcessClient(model=ModelConfig(model=str(tokenizer_path))) as client:
        params = SamplingParams(max_tokens=30, ignore_eos=True)
        text = last(client.generate("hello there", params)).outputs[0].text
        stop = text[6:9]
        params = replace(params, stop=[stop], include_stop_str_in_output=include)
        expected = text[: text.index(stop)] + (stop if include else "")
        for kind in RequestOutputKind:
            outputs = list(client.generate("hello there", replace(params, output_kind=kind)))
            completion = outputs[-1].outputs[0]
            if kind is DELTA:
                (completion,) = join(outputs)
            assert completion.text == expected, kind
            assert (completion.finish_reason, completion.stop_reason) == ("stop", stop), kind


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_the_wire_carries_each_token_once(client: InProcessClient, kind: RequestOutputKind) -> None:
    outputs = list(client.generate([1, 2, 3], replace(TEN, n=2, output_kind=kind)))
    messages = [reply for reply in client.engine.replies if reply["type"] == "output"]
    assert len(messages) == len(outputs) == (1 if kind is FINAL_ONLY else len(messages))
    sent = [token for m in messages for entry in m["outputs"] for token in entry["token_ids"]]
    assert len(sent) == 20


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_a_cancelled_request_ends_with_what_was_generated(
    client: InProcessClient, kind: RequestOutputKind
) -> None:
    params = SamplingParams(max_tokens=400, output_kind=kind)
    request_id = client.submit([1], params, stream=True)
    if kind is FINAL_ONLY:
        client.poll(0.05)
    else:
        client.poll()
    client.cancel(request_id)
    results: list[Any] = []
    while client.num_outstanding:
        results += client.poll(5.0)
    assert results[-1].finished
    assert results[-1].outputs[0].finish_reason == "abort"


def test_submit_without_stream_is_final_only(client: InProcessClient) -> None:
    client.submit([1, 2, 3], replace(TEN, output_kind=DELTA))
    results: list[Any] = []
    while client.num_outstanding:
        results += client.poll(5.0)
    assert [len(result.outputs[0].token_ids) for result in results] == [10]
