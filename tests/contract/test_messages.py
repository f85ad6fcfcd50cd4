"""Every class that crosses a process boundary, with any values its types allow."""

import ast
import random
from array import array
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.engine.config import EngineConfig
from loraplex.engine.ipc import codec
from loraplex.engine.ipc.wire_types import WIRE_TYPES
from loraplex.scheduler.frontend_protocol import StepOutputs
from loraplex.scheduler.worker_protocol import (
    Float32Array,
    Int32Array,
    Int64Array,
    Message,
    Record,
)

ROOT = Path(__file__).parents[2]

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
ARRAYS: dict[Any, st.SearchStrategy[Any]] = {
    Int32Array: st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5).map(lambda v: array("i", v)),
    Int64Array: st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5).map(lambda v: array("q", v)),
    Float32Array: st.lists(st.floats(width=32, allow_nan=False), max_size=5).map(
        lambda v: array("f", v)
    ),
}


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of an annotated type."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is EngineConfig:
        return st.just(EngineConfig())
    if hint in ARRAYS:
        return ARRAYS[hint]
    if origin is UnionType:
        return st.none() | values_of(args[0])
    if origin is list:
        return st.lists(values_of(args[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(values_of(args[0]), values_of(args[1]), max_size=3)
    if isinstance(hint, type) and issubclass(hint, Record):
        return instances_of(hint)
    return {
        int: st.integers(-(2**63), 2**64 - 1),
        float: st.floats(allow_nan=False),
        str: st.text(max_size=8),
        bytes: st.binary(max_size=8),
        bool: st.booleans(),
        Any: PLAIN,
    }[hint]


def instances_of(cls: Any) -> st.SearchStrategy[Any]:
    hints = get_type_hints(cls)
    values = {name: values_of(hints[name]) for name in cls.__struct_fields__}
    if cls is StepOutputs:  # its columns have one length
        rows = st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**31 - 1)), max_size=5)
        return st.builds(
            lambda rows, details: StepOutputs(
                array("q", [row[0] for row in rows]), array("i", [row[1] for row in rows]), details
            ),
            rows,
            values["details"],
        )
    return st.builds(cls, **values)


def test_no_message_is_forgotten() -> None:
    """A class that is not in WIRE_TYPES could not be sent."""
    declared = {cls for cls in Message.__subclasses__() if cls.__module__.startswith("loraplex.")}
    assert declared == set(WIRE_TYPES)
    assert len({cls.__name__ for cls in WIRE_TYPES}) == len(WIRE_TYPES)


@pytest.mark.parametrize("cls", WIRE_TYPES, ids=lambda cls: cls.__name__)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_round_trip_keeps_everything(cls: type, data: st.DataObject) -> None:
    message = data.draw(instances_of(cls))
    assert codec.decode(codec.encode(message)) == message


@pytest.mark.parametrize("cls", WIRE_TYPES, ids=lambda cls: cls.__name__)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_damage_is_a_wire_error_or_another_valid_message(cls: type, data: st.DataObject) -> None:
    encoded = bytearray(codec.encode(data.draw(instances_of(cls))))
    rng = random.Random(data.draw(st.integers(0, 1000)))
    for _ in range(20):
        damaged = bytearray(encoded)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        damaged = damaged[: rng.randint(1, len(damaged))] if rng.random() < 0.3 else damaged
        try:
            decoded = codec.decode(bytes(damaged))
        except codec.WireError:
            continue
        assert type(decoded) in WIRE_TYPES


@pytest.mark.parametrize("cls", WIRE_TYPES, ids=lambda cls: cls.__name__)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_one_field_more_or_less_is_refused(cls: type, data: st.DataObject) -> None:
    encoded = codec.encode(data.draw(instances_of(cls)))
    version, body = msgpack.unpackb(encoded, strict_map_key=False)
    for changed in (body + [None], body[:-1]):
        with pytest.raises(codec.WireError):
            codec.decode(msgpack.packb([version, changed]))


def test_nothing_unpickles() -> None:
    """Bytes from another process must never run code."""
    banned = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
    for folder in ("engine", "scheduler", "entrypoints"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not banned & {name.split(".")[0] for name in names}, path
                banned_calls = ("send_pyobj", "recv_pyobj")
                assert not (isinstance(node, ast.Attribute) and node.attr in banned_calls), path
