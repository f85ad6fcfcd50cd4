import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.engine.frontend.sampling_params import RequestOutputKind
from loraplex.entrypoints.client.list_prefix import ListPrefix
from loraplex.entrypoints.client.output_assembler import OutputAssembler
from loraplex.entrypoints.client.outputs import RequestOutput


def message(token_id: int, *, logprobs: bool = False, finished: bool = False) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "index": 0,
        "text": "",
        "token_ids": [token_id],
        "finish_reason": "length" if finished else None,
        "stop_reason": None,
    }
    if logprobs:
        entry["logprobs"] = [[[token_id, -0.5, 1, "x"]]]
    reply = {"type": "output", "request_id": "r", "outputs": [entry], "finished": finished}
    return {**reply, "usage": {"cached_tokens": 0}} if finished else reply


def assembler(kind: RequestOutputKind) -> OutputAssembler:
    return OutputAssembler(RequestOutput("r"), 1, kind)


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_later_messages_do_not_change_an_output(kind: RequestOutputKind) -> None:
    adding = assembler(kind)
    outputs = [adding.add(message(i, logprobs=True, finished=i == 9)) for i in range(10)]
    for i, output in enumerate(outputs):
        (completion,) = output.outputs
        first = i if kind is RequestOutputKind.DELTA else 0
        assert completion.token_ids == list(range(first, i + 1))
        assert completion.logprobs is not None
        assert [list(position) for position in completion.logprobs] == [
            [token_id] for token_id in range(first, i + 1)
        ]
        assert completion.cumulative_logprob == -0.5 * (i + 1)
    assert isinstance(outputs[-1].outputs[0].token_ids, list)
    assert isinstance(outputs[-1].outputs[0].logprobs, list)


@pytest.mark.parametrize("kind", [RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA])
def test_outputs_of_a_long_stream_share_their_lists(kind: RequestOutputKind) -> None:
    """Copies of the token ids alone would take 8 * 2,000 ** 2 / 2 bytes, 16 MB."""
    num_tokens = 2000
    messages = [message(1000 + i) for i in range(num_tokens)]
    adding = assembler(kind)
    tracemalloc.start()
    outputs = [adding.add(each) for each in messages]
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(outputs) == num_tokens
    assert peak_bytes < 4 << 20


@given(
    st.lists(st.integers()),
    st.lists(st.integers()),
    st.slices(8) | st.integers(-9, 9),
)
def test_a_prefix_reads_as_the_list_that_it_was_made_of(
    entries: list[int], later: list[int], index: int | slice
) -> None:
    expected = list(entries)
    prefix = ListPrefix(entries)
    entries += later
    assert prefix == expected and expected == prefix
    assert list(prefix) == expected and len(prefix) == len(expected)
    assert repr(prefix) == repr(expected)
    assert prefix + [7] == [*expected, 7] and [7] + prefix == [7, *expected]
    assert (prefix == [*expected, 7]) is False
    assert list(reversed(prefix)) == expected[::-1]
    if isinstance(index, slice) or -len(expected) <= index < len(expected):
        assert prefix[index] == expected[index]
    else:
        with pytest.raises(IndexError):
            prefix[index]
