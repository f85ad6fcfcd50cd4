"""Messages to bytes and back: MessagePack ``[version, tag, field, field, ...]``, never pickle.

Nested dataclasses are plain lists of their fields. An ``array`` is an extension value holding
raw little-endian items: type 1 is int32, 2 is int64, 3 is float32. One codec per class is
compiled from its type hints on first use; decoding checks every type and count.
"""

import sys
import types
from array import array
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Generic, TypeVar, Union, get_args, get_origin, get_type_hints

import msgpack

from loraplex.engine.errors import LoraplexError
from loraplex.engine.ipc.messages import PROTOCOL_VERSION, WIRE_TYPES

_EXT_OF_TYPECODE = {"i": 1, "q": 2, "f": 3}
_TYPECODE_OF_EXT = {ext: code for code, ext in _EXT_OF_TYPECODE.items()}
_INT_TYPECODES = frozenset("iq")
_FLOAT_TYPECODES = frozenset("f")

Convert = Callable[[Any], Any]


class WireError(LoraplexError):
    """Bytes that are no message of this version, or a message with a value of a wrong type."""

    code = "wire"


def encode(message: object) -> bytes:
    """Raises WireError when the message's class is unknown or a field cannot be sent."""
    cls = type(message)
    tag = _TAGS.get(cls)
    if tag is None:
        raise WireError(f"{cls.__name__} is no wire type")
    try:
        values = _encoder(cls)(message)
        return msgpack.packb([PROTOCOL_VERSION, tag, *values])
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise WireError(f"cannot encode {cls.__name__}: {error}") from None


def decode(data: "bytes | memoryview") -> Any:
    """Raises WireError when `data` is not exactly one message of this version."""
    try:
        values = msgpack.unpackb(data, ext_hook=_read_array, strict_map_key=False)
    except Exception as error:  # msgpack raises many kinds; the bytes are at fault in all of them
        raise WireError(f"not a message: {str(error)[:200]}") from None
    if not isinstance(values, list) or len(values) < 2:
        raise WireError("a message must be a list of version, tag and fields")
    version, tag = values[0], values[1]
    if version != PROTOCOL_VERSION:
        raise WireError(f"message of version {version!r:.40}, this is {PROTOCOL_VERSION}")
    if type(tag) is not int or not 0 <= tag < len(WIRE_TYPES):
        raise WireError(f"unknown message tag {tag!r:.40}")
    return _decoder(WIRE_TYPES[tag])(values[2:])


_TAGS = {cls: tag for tag, cls in enumerate(WIRE_TYPES)}
_encoders: dict[type, Convert] = {}
_decoders: dict[type, Convert] = {}


def _encoder(cls: type) -> Convert:
    found = _encoders.get(cls)
    return found if found is not None else _encoders.setdefault(cls, _compile_encoder(cls))


def _decoder(cls: type) -> Convert:
    found = _decoders.get(cls)
    return found if found is not None else _decoders.setdefault(cls, _compile_decoder(cls))


_Item = TypeVar("_Item")


class _Array(Generic[_Item]):
    """Stands for ``array`` in type hints, which cannot be subscripted before Python 3.12."""


def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls, localns={"array": _Array})
    return {f.name: hints[f.name] for f in fields(cls)}


def _compile_encoder(cls: type) -> Convert:
    """Returns a function from an instance to the list of its encoded fields."""
    parts, converters = [], {}
    for i, (name, hint) in enumerate(_hints(cls).items()):
        convert = _encode_hint(hint)
        parts.append(f"m.{name}" if convert is None else f"c{i}(m.{name})")
        converters[f"c{i}"] = convert
    run: Convert = eval(f"lambda m: [{', '.join(parts)}]", converters)
    return run


def _encode_hint(hint: Any) -> Convert | None:
    """A converter for values of this type, or None where MessagePack takes them as they are."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is _Array:
        return _write_array
    if origin in (Union, types.UnionType):
        inner = _encode_hint(_optional(hint))
        return None if inner is None else _each_optional(inner)
    if origin is list:
        inner = _encode_hint(args[0])
        return None if inner is None else _each(inner)
    if isinstance(hint, type) and hasattr(hint, "__dataclass_fields__"):
        return lambda v: _encoder(hint)(v)
    return None


def _each(convert: Convert) -> Convert:
    return lambda values: [convert(value) for value in values] if values else []


def _each_optional(convert: Convert) -> Convert:
    return lambda value: None if value is None else convert(value)


def _compile_decoder(cls: type) -> Convert:
    """Returns a function from the list of encoded fields to an instance."""
    hints = _hints(cls)
    checks = [_decode_hint(hint) for hint in hints.values()]
    count, label = len(hints), cls.__name__
    parts = [f"c{i}(v[{i}])" for i in range(count)]
    names = {"cls": cls} | {f"c{i}": check for i, check in enumerate(checks)}
    build: Convert = eval(f"lambda v: cls({', '.join(parts)})", names)

    def run(values: Any) -> Any:
        if type(values) is not list or len(values) != count:
            raise WireError(f"{label} takes a list of {count} fields")
        try:
            return build(values)
        except (TypeError, ValueError) as error:
            culprit = _culprit(hints, checks, values)
            raise WireError(f"{label}{culprit}: {error}") from None

    return run


def _culprit(hints: dict[str, Any], checks: list[Convert], values: list[Any]) -> str:
    """Which field does not pass; empty when they do not go together."""
    for name, check, value in zip(hints, checks, values, strict=True):
        try:
            check(value)
        except (TypeError, ValueError, WireError):
            return f".{name}"
    return ""


def _decode_hint(hint: Any) -> Convert:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return lambda v: v
    if hint in _SCALARS:
        return _SCALARS[hint]
    if origin is _Array:
        return _check_array(_FLOAT_TYPECODES if args[0] is float else _INT_TYPECODES)
    if origin in (Union, types.UnionType):
        return _each_optional(_decode_hint(_optional(hint)))
    if origin is list:
        return _check_list(_decode_hint(args[0]))
    if origin is tuple:
        return _check_tuple(args)
    if origin is dict:
        return _check_dict(_decode_hint(args[0]), _decode_hint(args[1]))
    if isinstance(hint, type) and hasattr(hint, "__dataclass_fields__"):
        return lambda v: _decoder(hint)(v)
    raise TypeError(f"no wire format for a field of type {hint}")


def _optional(hint: Any) -> Any:
    """X of ``X | None``; no other union can be told apart on the wire."""
    inner = [arg for arg in get_args(hint) if arg is not type(None)]
    if len(inner) != 1 or len(get_args(hint)) != 2:
        raise TypeError(f"no wire format for the union {hint}")
    return inner[0]


def _check_int(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"expected an integer, got {type(value).__name__}")
    return value


def _check_float(value: Any) -> float:
    if type(value) is float:
        return value
    return float(_check_int(value))


def _check_str(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"expected a string, got {type(value).__name__}")
    return value


def _check_bool(value: Any) -> bool:
    if type(value) is not bool:
        raise TypeError(f"expected a bool, got {type(value).__name__}")
    return value


_SCALARS: dict[Any, Convert] = {
    int: _check_int, float: _check_float, str: _check_str, bool: _check_bool,
}  # fmt: skip


def _check_array(typecodes: frozenset[str]) -> Convert:
    def check(value: Any) -> "array[Any]":
        if type(value) is not array or value.typecode not in typecodes:
            raise TypeError(f"expected an array of {sorted(typecodes)}, got {type(value).__name__}")
        return value

    return check


def _check_list(inner: Convert) -> Convert:
    def check(value: Any) -> list[Any]:
        if type(value) is not list:
            raise TypeError(f"expected a list, got {type(value).__name__}")
        return [inner(x) for x in value]

    return check


def _check_tuple(args: tuple[Any, ...]) -> Convert:
    if len(args) == 2 and args[1] is Ellipsis:
        items = _check_list(_decode_hint(args[0]))
        return lambda value: tuple(items(value))
    inner = [_decode_hint(arg) for arg in args]

    def check(value: Any) -> tuple[Any, ...]:
        if type(value) is not list or len(value) != len(inner):
            raise TypeError(f"expected a list of {len(inner)}")
        return tuple(one(x) for one, x in zip(inner, value, strict=True))

    return check


def _check_dict(key: Convert, inner: Convert) -> Convert:
    def check(value: Any) -> dict[Any, Any]:
        if type(value) is not dict:
            raise TypeError(f"expected a map, got {type(value).__name__}")
        return {key(k): inner(v) for k, v in value.items()}

    return check


def _write_array(values: "array[Any]") -> msgpack.ExtType:
    if type(values) is not array or values.typecode not in _EXT_OF_TYPECODE:
        raise TypeError(f"expected an array of i, q or f, got {type(values).__name__}")
    if sys.byteorder == "big":
        values = values[:]
        values.byteswap()
    return msgpack.ExtType(_EXT_OF_TYPECODE[values.typecode], values.tobytes())


def _read_array(ext: int, data: bytes) -> "array[Any]":
    typecode = _TYPECODE_OF_EXT.get(ext)
    if typecode is None:
        raise ValueError(f"unknown extension type {ext}")
    values: array[Any] = array(typecode)
    values.frombytes(data)
    if sys.byteorder == "big":
        values.byteswap()
    return values
