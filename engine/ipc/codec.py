"""Turns messages into bytes and back: MessagePack ``[version, [class name, field, ...]]``.

msgspec checks the type of every field when it decodes. Nothing is ever unpickled.
"""

import re
import sys
from array import array
from typing import Any, Union

import msgspec
from msgspec.msgpack import Ext

from loraplex.engine.errors import LoraplexError
from loraplex.engine.ipc.wire_types import PROTOCOL_VERSION, WIRE_TYPES
from loraplex.scheduler.worker_protocol import Float32Array, Int32Array, Int64Array


def _list_head(length: int) -> bytes:
    """The MessagePack header of a list."""
    return msgspec.msgpack.encode([0] * length)[:-length]


_PREFIX = bytes([0x92, PROTOCOL_VERSION])  # a list of two, the version first
_ARRAY_TYPES: tuple[Any, ...] = (Int32Array, Int64Array, Float32Array)
_EXTENSIONS: dict[str, int] = {kind.typecode: kind.extension for kind in _ARRAY_TYPES}
_IS_BIG_ENDIAN = sys.byteorder == "big"
_BY_NAME = {cls.__name__: cls for cls in WIRE_TYPES}
# The bytes that give the length of each class's list. msgspec would accept a shorter list where the
# missing fields have defaults; decode() does not.
_HEADS = {cls: _list_head(1 + len(cls.__struct_fields__)) for cls in WIRE_TYPES}


class WireError(LoraplexError):
    """The bytes are no message of this version, or the message cannot be encoded."""

    code = "wire"


def encode(message: object) -> bytes:
    """Raises WireError if the class is no wire type or a field has no wire format."""
    if type(message) not in _HEADS:
        raise WireError(f"{type(message).__name__} is no wire type")
    try:
        return _PREFIX + _encoder.encode(message)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise WireError(f"cannot encode {type(message).__name__}: {error}") from None


def decode(data: "bytes | memoryview") -> Any:
    """Raises WireError if `data` is not exactly one message of this version."""
    if data[:2] != _PREFIX:
        raise WireError(_why_not_prefixed(bytes(data[:2])))
    body = memoryview(data)[2:]
    try:
        message = _decoder.decode(body)
    except Exception as error:  # of many kinds; the bytes are at fault in all of them
        raise WireError(_explain(body, error)) from None
    head = _HEADS[type(message)]
    if body[: len(head)] != head:
        raise WireError(f"{type(message).__name__} has too few fields")
    return message


def _write_array(value: Any) -> Ext:
    if type(value) is not array or value.typecode not in _EXTENSIONS:
        raise TypeError(f"{type(value).__name__} has no wire format")
    if _IS_BIG_ENDIAN:
        value = value[:]
        value.byteswap()
    return Ext(_EXTENSIONS[value.typecode], value.tobytes())


def _read_array(kind: Any, value: Any) -> "array[Any]":
    """`kind` is Int32Array, Int64Array or Float32Array."""
    if type(value) is not Ext or value.code != kind.extension:
        raise TypeError(f"expected {kind.__name__}")
    values = array(kind.typecode)
    values.frombytes(value.data)
    if _IS_BIG_ENDIAN:
        values.byteswap()
    return values


def _why_not_prefixed(start: bytes) -> str:
    if len(start) == 2 and start[0] == _PREFIX[0] and start[1] < 0x80:
        return f"message of version {start[1]}, this is {PROTOCOL_VERSION}"
    return "not a message: it does not begin with a protocol version"


def _explain(body: memoryview, error: Exception) -> str:
    """Returns the error's text with the class and the field that are at fault."""
    text = str(error)[:200]
    try:
        cls = _BY_NAME[msgspec.msgpack.decode(body)[0]]
    except Exception:  # too damaged to tell
        return f"not a message: {text}"
    index = re.search(r"\$\[(\d+)\]", text)
    fields = ("", *cls.__struct_fields__)
    field = fields[int(index[1])] if index and int(index[1]) < len(fields) else ""
    return f"{cls.__name__}{'.' + field if field else ''}: {text}"


_encoder = msgspec.msgpack.Encoder(enc_hook=_write_array)
_decoder: "msgspec.msgpack.Decoder[Any]" = msgspec.msgpack.Decoder(
    Union[WIRE_TYPES],  # noqa: UP007  # a tuple cannot be written with |
    dec_hook=_read_array,
)
