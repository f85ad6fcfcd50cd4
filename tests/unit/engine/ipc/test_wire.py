import time
from array import array

import msgpack
import pytest

from loraplex.engine.ipc import codec
from loraplex.engine.ipc.messages import AbortRequests, EngineDead, SequenceOutput, StepOutputs
from loraplex.scheduler.worker_protocol import StepPlan, TokenLogprobs


def test_arrays_are_raw_little_endian_bytes() -> None:
    frame = codec.encode(AbortRequests(array("q", [1, 2**40])))
    version, tag, ids = msgpack.unpackb(frame)
    assert (version, tag) == (1, 3)
    assert ids == msgpack.ExtType(2, (1).to_bytes(8, "little") + (2**40).to_bytes(8, "little"))


@pytest.mark.parametrize(
    ("frame", "text"),
    [
        (b"", "not a message"),
        (b"\xc1", "not a message"),
        (b"\x91" * 5000, "not a message"),
        (msgpack.packb({"a": 1}), "must be a list"),
        (msgpack.packb([1]), "must be a list"),
        (msgpack.packb([2, 9, "x"]), "version 2"),
        (msgpack.packb(["1", 9, "x"]), "version"),
        (msgpack.packb([1, 99, "x"]), "unknown message tag"),
        (msgpack.packb([1, -1, "x"]), "unknown message tag"),
        (msgpack.packb([1, True, "x"]), "unknown message tag"),
        (msgpack.packb([1, 9, 5]), "EngineDead.reason: expected a string"),
        (msgpack.packb([1, 9, "x", "y"]), "takes a list of 1"),
        (msgpack.packb([1, 9, "x"]) + b"\x00", "not a message"),
        (msgpack.packb([1, 3, [1, 2]]), "AbortRequests.request_ids: expected an array"),
        (msgpack.packb([1, 3, msgpack.ExtType(3, b"\0" * 8)]), "expected an array"),
        (msgpack.packb([1, 3, msgpack.ExtType(2, b"\0" * 7)]), "not a message"),
        (msgpack.packb([1, 3, msgpack.ExtType(77, b"")]), "unknown extension"),
        (msgpack.packb([1, 4, [["x"]]]), "SequenceOutput takes a list of 9"),
    ],
)
def test_wrong_bytes_are_refused_with_a_reason(frame: bytes, text: str) -> None:
    with pytest.raises(codec.WireError, match=text):
        codec.decode(frame)


def test_the_field_at_fault_is_named_in_nested_messages() -> None:
    good = SequenceOutput(1, array("i", [2]), logprobs=[TokenLogprobs(*[array("i")] * 3)])
    with pytest.raises(codec.WireError, match=r"TokenLogprobs.logprobs"):
        codec.decode(codec.encode(StepOutputs([good])))


@pytest.mark.parametrize("message", [object(), "text", {"a": 1}, None])
def test_only_wire_types_are_sent(message: object) -> None:
    with pytest.raises(codec.WireError, match="no wire type"):
        codec.encode(message)


@pytest.mark.parametrize(
    "message",
    [
        AbortRequests([1, 2]),  # type: ignore[arg-type]
        AbortRequests(array("d", [1.0])),
        EngineDead(object()),  # type: ignore[arg-type]
    ],
)
def test_a_field_of_a_wrong_type_is_found_when_sending(message: object) -> None:
    with pytest.raises(codec.WireError, match="cannot encode"):
        codec.encode(message)


def test_a_decode_plan_of_256_rows_is_cheap() -> None:
    rows = array("i", range(256))
    plan = StepPlan(1, rows[:4], [], rows[:16], rows[:16], rows, rows, rows, rows)
    best = float("inf")
    for _ in range(200):
        start = time.perf_counter()
        codec.decode(codec.encode(plan))
        best = min(best, time.perf_counter() - start)
    assert best < 100e-6
