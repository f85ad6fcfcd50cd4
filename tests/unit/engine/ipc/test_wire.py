from array import array

import msgpack
import pytest

from loraplex.engine.ipc import codec
from loraplex.engine.ipc.messages.frontend import AbortRequests, EngineDead, StatsReply
from loraplex.engine.ipc.wire_types import PROTOCOL_VERSION
from loraplex.scheduler.frontend_protocol import SequenceOutput, StepOutputs
from loraplex.scheduler.worker_protocol import TokenLogprobs

from helpers.fakes.fake_model import sampling_spec


def test_arrays_are_raw_little_endian_bytes() -> None:
    frame = codec.encode(AbortRequests(array("q", [1, 2**40])))
    version, (name, ids) = msgpack.unpackb(frame)
    assert (version, name) == (PROTOCOL_VERSION, "AbortRequests")
    assert ids == msgpack.ExtType(2, (1).to_bytes(8, "little") + (2**40).to_bytes(8, "little"))


def frame(*body: object, version: object = PROTOCOL_VERSION) -> bytes:
    return bytes(msgpack.packb([version, list(body)]))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "not a message"),
        (b"\xc1", "not a message"),
        (b"\x91" * 5000, "not a message"),
        (bytes([0x92, PROTOCOL_VERSION]) + b"\x91" * 5000, "not a message"),
        (msgpack.packb({"a": 1}), "not a message"),
        (msgpack.packb([PROTOCOL_VERSION]), "not a message"),
        (frame("EngineDead", "x", version=3), "version 3"),
        (frame("EngineDead", "x", version="1"), "not a message"),
        (frame("NoSuchThing", "x"), "NoSuchThing"),
        (frame(9, "x"), "Expected `str`"),
        (msgpack.packb([PROTOCOL_VERSION, {"EngineDead": 1}]), "Expected `array`"),
        (frame("EngineDead", 5), "EngineDead.reason: Expected `str`, got `int`"),
        (frame("EngineDead", "x", "y"), "EngineDead: .*length 1, got 2"),
        (frame("AdapterReply", 1), "AdapterReply has too few fields"),
        (frame("EngineDead", "x") + b"\x00", "EngineDead|trailing"),
        (frame("AbortRequests", [1, 2]), "AbortRequests.request_ids: expected Int64Array"),
        (frame("AbortRequests", msgpack.ExtType(3, b"\0" * 8)), "expected Int64Array"),
        (frame("AbortRequests", msgpack.ExtType(2, b"\0" * 7)), "AbortRequests.request_ids: bytes"),
        (frame("AbortRequests", msgpack.ExtType(77, b"")), "expected Int64Array"),
        (
            frame("StepOutputs", msgpack.ExtType(2, b""), msgpack.ExtType(1, b""), [["x"]]),
            "StepOutputs.details: Expected .*length",
        ),
        (
            frame("StepOutputs", msgpack.ExtType(2, b"\0" * 8), msgpack.ExtType(1, b""), []),
            "1 request ids come with 0 token ids",
        ),
    ],
)
def test_wrong_bytes_are_refused_with_a_reason(data: bytes, text: str) -> None:
    with pytest.raises(codec.WireError, match=text):
        codec.decode(data)


def test_the_field_at_fault_is_named_in_nested_messages() -> None:
    bad = SequenceOutput(1, array("i", [2]), logprobs=[TokenLogprobs(*[array("i")] * 3)])
    outputs = StepOutputs(array("q"), array("i"), [bad])
    with pytest.raises(codec.WireError, match=r"StepOutputs.details: expected Float32Array"):
        codec.decode(codec.encode(outputs))


@pytest.mark.parametrize("message", [object(), "text", {"a": 1}, None, sampling_spec()])
def test_only_wire_types_are_sent(message: object) -> None:
    with pytest.raises(codec.WireError, match="no wire type"):
        codec.encode(message)


@pytest.mark.parametrize(
    "message",
    [
        AbortRequests(array("d", [1.0])),
        EngineDead(object()),  # type: ignore[arg-type]
        StatsReply(1, {"x": 2**64}),
    ],
)
def test_a_value_without_a_wire_format_is_found_when_sending(message: object) -> None:
    with pytest.raises(codec.WireError, match="cannot encode"):
        codec.encode(message)


def test_a_value_of_a_wrong_type_is_found_when_receiving() -> None:
    data = codec.encode(AbortRequests([1, 2]))  # type: ignore[arg-type]
    with pytest.raises(codec.WireError, match="AbortRequests.request_ids"):
        codec.decode(data)


def test_outputs_list_the_columns_before_the_details() -> None:
    end = SequenceOutput(3, array("i", [9]), finish_reason="stop", stop_token_id=9)
    outputs = codec.decode(codec.encode(StepOutputs(array("q", [1, 2]), array("i", [7, 8]), [end])))
    assert [(o.request_id, list(o.token_ids), o.finish_reason) for o in outputs] == [
        (1, [7], ""), (2, [8], ""), (3, [9], "stop"),
    ]  # fmt: skip
