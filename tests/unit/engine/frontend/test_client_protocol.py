from array import array
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.engine.errors import (
    AdapterError,
    ClientError,
    EngineDeadError,
    LoraplexError,
    QueueFullError,
    UnknownAdapterError,
    error_from_reply,
)
from loraplex.engine.frontend import protocol
from loraplex.engine.frontend.sampling_params import RequestOutputKind, SamplingParams
from loraplex.engine.ipc import messages
from loraplex.scheduler import worker_protocol

GENERATE = {"type": "generate", "request_id": "a", "prompt": "x"}


def test_a_request_with_everything() -> None:
    parsed = protocol.parse(
        {
            "version": 1,
            "type": "generate",
            "request_id": "a",
            "prompt_token_ids": [1, 2],
            "sampling_params": {"n": 2, "logit_bias": {"7": 1.5}},
            "adapter": "org/pirate-8_v1.0",
            "salt": "tenant",
            "priority": -3,
            "stream": False,
            "use_prefix_cache": False,
            "return_prompt_token_ids": True,
        }
    )
    assert isinstance(parsed, protocol.GenerateRequest)
    assert parsed.prompt_token_ids == array("i", [1, 2])
    assert parsed.sampling_params.logit_bias == {7: 1.5}
    assert (parsed.adapter, parsed.priority, parsed.stream) == ("org/pirate-8_v1.0", -3, False)


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_an_output_kind_survives_the_wire(kind: RequestOutputKind) -> None:
    wire = msgpack.packb(
        {**GENERATE, "sampling_params": SamplingParams(output_kind=kind).to_wire()}
    )
    parsed = protocol.parse(protocol.decode_frame(wire))
    assert isinstance(parsed, protocol.GenerateRequest)
    assert parsed.sampling_params.output_kind is kind
    assert parsed.final_only == (kind is RequestOutputKind.FINAL_ONLY)


def test_none_is_as_good_as_leaving_it_out() -> None:
    parsed = protocol.parse({**GENERATE, "prompt_token_ids": None, "adapter": None})
    assert isinstance(parsed, protocol.GenerateRequest)
    assert parsed.adapter == ""


@pytest.mark.parametrize(
    ("changes", "code", "text"),
    [
        ({"type": "shutdown"}, "malformed", '"type" must be one of'),
        ({"type": None}, "malformed", "type"),
        ({"type": ["generate"]}, "malformed", "type"),
        ({"version": 2}, "version", "version 1"),
        ({"version": True}, "version", "version 1"),
        ({"version": "1"}, "version", "version 1"),
        ({"request_id": ""}, "bad_request", "request_id"),
        ({"request_id": 5}, "bad_request", "request_id: must be a string"),
        ({"request_id": "x" * 257}, "bad_request", "request_id"),
        ({"promt": "x"}, "bad_request", "does not take 'promt'"),
        ({5: "x"}, "bad_request", "does not take 5"),
        ({"prompt": 5}, "bad_request", "prompt: must be a string"),
        ({"prompt": b"x"}, "bad_request", "prompt: must be a string"),
        ({"prompt": None}, "bad_request", "exactly one of"),
        ({"prompt_token_ids": [1]}, "bad_request", "exactly one of"),
        ({"prompt": None, "prompt_token_ids": [1.0]}, "bad_request", "list of integers"),
        ({"prompt": None, "prompt_token_ids": [True]}, "bad_request", "list of integers"),
        ({"prompt": None, "prompt_token_ids": "12"}, "bad_request", "list of integers"),
        ({"prompt": None, "prompt_token_ids": [2**40]}, "bad_request", "32 bits"),
        ({"prompt": None, "messages": []}, "bad_request", "messages"),
        ({"prompt": None, "messages": [5]}, "bad_request", "messages"),
        ({"prompt": None, "messages": [{"content": "x"}]}, "bad_request", "role"),
        ({"prompt": None, "messages": [{"role": "u", "content": 5}]}, "bad_request", "content"),
        ({"continue_final_message": True}, "bad_request", "add_generation_prompt=false"),
        ({"sampling_params": 5}, "bad_request", "sampling_params"),
        ({"sampling_params": {"temprature": 1}}, "bad_request", "unknown sampling parameters"),
        ({"sampling_params": {"top_p": 2.0}}, "bad_request", "top_p"),
        ({"sampling_params": {"n": 2**70 % 2**64}}, "bad_request", "n must lie"),
        (
            {"sampling_params": {"output_kind": "all"}},
            "bad_request",
            "cumulative, delta, final_only",
        ),
        ({"sampling_params": {"output_kind": 1}}, "bad_request", "output_kind must be one of"),
        ({"adapter": "../../etc"}, "bad_request", "adapter name"),
        ({"adapter": "a b"}, "bad_request", "adapter name"),
        ({"adapter": 7}, "bad_request", "adapter"),
        ({"salt": 5}, "bad_request", "salt"),
        ({"priority": 2**31}, "bad_request", "32 bits"),
        ({"priority": 1.5}, "bad_request", "priority"),
        ({"stream": 1}, "bad_request", "stream"),
    ],
)
def test_wrong_values_have_a_code_and_name_the_field(
    changes: dict[Any, Any], code: str, text: str
) -> None:
    with pytest.raises(ClientError, match=text) as caught:
        protocol.parse({**GENERATE, **changes})
    assert caught.value.code == code


@pytest.mark.parametrize("internal", [messages, worker_protocol])
def test_a_clients_message_shares_no_name_with_an_internal_one(internal: Any) -> None:
    names = {cls.__name__ for cls in protocol.CLIENT_MESSAGES.values()}
    assert not names & set(vars(internal))


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ClientError, match="load_adapter needs 'path'"):
        protocol.parse({"type": "load_adapter", "request_id": "a", "name": "x"})


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        b"garbage",
        b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        msgpack.packb([1, 2]),
        msgpack.packb(5),
        msgpack.packb({"a": msgpack.ExtType(5, b"xx")}),
        msgpack.packb({"a": msgpack.Timestamp(1)}),
        b"\x81\x91\x01\x01",  # a list as a key
        b"\x81\xa1\xff\x01",  # not UTF-8
        msgpack.packb({"a": 1}) + b"\x01",
    ],
)
def test_frames_that_are_no_map_are_malformed(frame: bytes) -> None:
    with pytest.raises(ClientError) as caught:
        protocol.decode_frame(frame)
    assert caught.value.code == "malformed"


JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text()
    | st.binary(),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text() | st.integers(0, 9), inner, max_size=4),
    max_leaves=10,
)  # fmt: skip
NAMES = ["type", "request_id", "prompt", "prompt_token_ids", "messages", "sampling_params",
         "adapter", "name", "path", "stream", "version", "priority", "salt"]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.sampled_from(NAMES), JSONISH),
    st.sampled_from([*protocol.CLIENT_MESSAGES, None]),
)
def test_whatever_comes_is_parsed_or_refused(message: dict[str, Any], kind: str | None) -> None:
    if kind is not None:
        message["type"] = kind
    try:
        parsed = protocol.parse(protocol.decode_frame(msgpack.packb(message)))
    except ClientError as error:
        assert error.code in ("malformed", "bad_request", "version")
    else:
        assert type(parsed) in protocol.CLIENT_MESSAGES.values()


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=64))
def test_random_bytes_are_refused_or_a_map(frame: bytes) -> None:
    try:
        assert isinstance(protocol.decode_frame(frame), dict)
    except ClientError as error:
        assert error.code == "malformed"


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        ("engine_dead", EngineDeadError),
        ("unknown_adapter", UnknownAdapterError),
        ("adapter", AdapterError),
        ("queue_full", QueueFullError),
        ("internal", LoraplexError),
        ("bad_request", ClientError),
        ("prompt_too_long", ClientError),
        ("from_the_future", ClientError),
    ],
)
def test_codes_become_exceptions_that_keep_their_code(code: str, cls: type) -> None:
    error = error_from_reply(code, "text")
    assert type(error) is cls
    assert error.code == code
    assert str(error) == "text"


def test_error_texts_are_short_whatever_the_client_sent() -> None:
    with pytest.raises(ClientError) as caught:
        protocol.parse({**GENERATE, "sampling_params": {"temperature": "x" * 1_000_000}})
    reply = protocol.error_reply("a", caught.value.code, str(caught.value))
    assert len(reply["message"]) <= protocol.MAX_ERROR_CHARS
