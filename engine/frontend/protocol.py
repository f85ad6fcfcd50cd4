"""The messages between clients and a frontend: MessagePack maps, described in docs/protocol.md.

Shared by both sides, so that names and checks exist once. What a client sends is parsed into
one of the classes of CLIENT_MESSAGES; every wrong byte ends in a ClientError with a code.
"""

from array import array
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import msgpack

from loraplex.engine import errors
from loraplex.engine.adapters.paths import ADAPTER_NAME
from loraplex.engine.errors import ClientError, LoraplexError, client_error
from loraplex.engine.frontend.sampling_params import SamplingParams

PROTOCOL_VERSION = 1
MAX_ID_CHARS = 256
MAX_ERROR_CHARS = 1000
MAX_MAP_ENTRIES = 1 << 18

Check = Callable[[Any], Any]


def _text(max_chars: int, *, empty: bool = True) -> Check:
    def check(value: Any) -> str:
        if not isinstance(value, str):
            raise TypeError(f"must be a string, got {_kind(value)}")
        if len(value) > max_chars or (not empty and not value):
            raise ValueError(f"must have {0 if empty else 1} to {max_chars} characters")
        return value

    return check


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"must be a bool, got {_kind(value)}")
    return value


def _int32(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"must be an integer, got {_kind(value)}")
    if not -(2**31) <= value < 2**31:
        raise ValueError("must fit 32 bits")
    return value


def _token_ids(value: Any) -> "array[int]":
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        raise TypeError("must be a list of integers")
    try:
        return array("i", value)
    except OverflowError:
        raise ValueError("holds a token id that does not fit 32 bits") from None


def _conversation(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise TypeError("must be a list of one or more maps")
    for turn in value:
        if not isinstance(turn, dict) or not all(isinstance(key, str) for key in turn):
            raise TypeError("each message must be a map with string keys")
        if not isinstance(turn.get("role"), str):
            raise TypeError('each message needs a string "role"')
        if not isinstance(turn.get("content"), str | list | None):
            raise TypeError('the "content" of a message must be a string or a list of parts')
    return value


def _sampling(value: Any) -> SamplingParams:
    return SamplingParams.from_wire(value)


def _adapter_name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"must be a string, got {_kind(value)}")
    if not ADAPTER_NAME.fullmatch(value):
        raise ValueError(
            f"{value[:40]!r} is no adapter name: letters, digits and . _ : / @ + - only, "
            "at most 200, a letter or digit first"
        )
    return value


def _optional_adapter(value: Any) -> str:
    return "" if value is None or value == "" else _adapter_name(value)


def _kind(value: object) -> str:
    return type(value).__name__


_ID = {"check": _text(MAX_ID_CHARS, empty=False)}
_FLAG = {"check": _bool}
_ANY_TEXT = {"check": _text(1 << 30)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """Exactly one of `prompt`, `prompt_token_ids` and `messages` is given."""

    request_id: str = field(metadata=_ID)
    prompt: str | None = field(default=None, metadata=_ANY_TEXT)
    prompt_token_ids: "array[int] | None" = field(default=None, metadata={"check": _token_ids})
    messages: list[dict[str, Any]] | None = field(default=None, metadata={"check": _conversation})
    add_generation_prompt: bool = field(default=True, metadata=_FLAG)
    continue_final_message: bool = field(default=False, metadata=_FLAG)
    sampling_params: SamplingParams = field(
        default_factory=SamplingParams, metadata={"check": _sampling}
    )
    adapter: str = field(default="", metadata={"check": _optional_adapter})
    salt: str = field(default="", metadata={"check": _text(MAX_ID_CHARS)})
    priority: int = field(default=0, metadata={"check": _int32})
    stream: bool = field(default=True, metadata=_FLAG)
    use_prefix_cache: bool = field(default=True, metadata=_FLAG)
    return_prompt_token_ids: bool = field(default=False, metadata=_FLAG)

    def __post_init__(self) -> None:
        given = [
            name
            for name in ("prompt", "prompt_token_ids", "messages")
            if getattr(self, name) is not None
        ]
        if len(given) != 1:
            raise ValueError(
                "give exactly one of prompt, prompt_token_ids and messages, "
                f"got {' and '.join(given) or 'none'}"
            )
        if self.add_generation_prompt and self.continue_final_message:
            raise ValueError(
                "continue_final_message needs add_generation_prompt=false: "
                "the answer continues the last message instead of starting a new one"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    request_id: str = field(metadata=_ID)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadAdapter:
    request_id: str = field(metadata=_ID)
    name: str = field(metadata={"check": _adapter_name})
    path: str = field(metadata={"check": _text(4096, empty=False)})
    lazy: bool = field(default=False, metadata=_FLAG)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadAdapter:
    request_id: str = field(metadata=_ID)
    name: str = field(metadata={"check": _adapter_name})


@dataclass(frozen=True, slots=True, kw_only=True)
class PinAdapter:
    request_id: str = field(metadata=_ID)
    name: str = field(metadata={"check": _adapter_name})


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpinAdapter:
    request_id: str = field(metadata=_ID)
    name: str = field(metadata={"check": _adapter_name})


@dataclass(frozen=True, slots=True, kw_only=True)
class ListAdapters:
    """All without a `name`."""

    request_id: str = field(metadata=_ID)
    name: str = field(default="", metadata={"check": _optional_adapter})


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    request_id: str = field(metadata=_ID)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    request_id: str = field(metadata=_ID)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """Answered with pong; needs no id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bye:
    """The client leaves: its requests are cancelled, nothing is answered."""


ClientMessage = (
    Generate
    | Cancel
    | LoadAdapter
    | UnloadAdapter
    | PinAdapter
    | UnpinAdapter
    | ListAdapters
    | Health
    | Stats
    | Ping
    | Bye
)
CLIENT_MESSAGES: dict[str, type] = {
    "generate": Generate,
    "cancel": Cancel,
    "load_adapter": LoadAdapter,
    "unload_adapter": UnloadAdapter,
    "pin_adapter": PinAdapter,
    "unpin_adapter": UnpinAdapter,
    "list_adapters": ListAdapters,
    "health": Health,
    "stats": Stats,
    "ping": Ping,
    "bye": Bye,
}


def decode_frame(frame: "bytes | memoryview") -> dict[str, Any]:
    """One client's frame as a map. ClientError "malformed" for anything else."""
    try:
        message = msgpack.unpackb(
            frame,
            strict_map_key=False,
            max_map_len=min(len(frame), MAX_MAP_ENTRIES),
            max_ext_len=0,
        )
    except Exception as error:  # msgpack raises many kinds; the bytes are at fault in all of them
        text = str(error)[:200] or _kind(error)
        raise client_error("malformed", f"not a MessagePack map: {text}") from None
    if not isinstance(message, dict):
        raise client_error("malformed", f"a message must be a map, got {_kind(message)}")
    return message


def parse(message: dict[str, Any]) -> ClientMessage:
    """Check a decoded map. ClientError: "malformed", "version" or "bad_request"."""
    message = dict(message)
    version = message.pop("version", PROTOCOL_VERSION)
    if version != PROTOCOL_VERSION or isinstance(version, bool):
        raise client_error("version", f"this server speaks protocol version {PROTOCOL_VERSION}")
    name = message.pop("type", None)
    cls = CLIENT_MESSAGES.get(name) if isinstance(name, str) else None
    if cls is None:
        raise client_error(
            "malformed", f'"type" must be one of {", ".join(CLIENT_MESSAGES)}, got {name!r:.40}'
        )
    values: dict[str, Any] = {}
    for spec in fields(cls):
        if spec.name in message:
            value = message.pop(spec.name)
            if value is None and spec.default is None:
                continue
            values[spec.name] = _checked(spec.name, spec.metadata["check"], value)
        elif spec.default is MISSING and spec.default_factory is MISSING:
            raise ClientError(f"{name} needs {spec.name!r}")
    if message:
        known = ", ".join(spec.name for spec in fields(cls))
        extra = ", ".join(f"{key!r:.40}" for key in list(message)[:5])
        raise ClientError(f"{name} does not take {extra}; it takes {known}")
    try:
        parsed: ClientMessage = cls(**values)
    except (TypeError, ValueError) as error:
        raise ClientError(str(error)) from None
    return parsed


def _checked(name: str, check: Check, value: Any) -> Any:
    try:
        return check(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ClientError(f"{name}: {str(error)[:MAX_ERROR_CHARS]}") from None


def request_id_of(message: dict[str, Any]) -> str:
    """The id to put on an error reply, as far as the message has one."""
    request_id = message.get("request_id")
    return request_id[:MAX_ID_CHARS] if isinstance(request_id, str) else ""


def error_reply(request_id: str, code: str, text: str) -> dict[str, Any]:
    return {
        "type": "error",
        "request_id": request_id,
        "code": code,
        "message": text[:MAX_ERROR_CHARS],
    }


def aborted_reply(request_id: str, num_sequences: int) -> dict[str, Any]:
    """The last output of a request that was cancelled before it began."""
    entry: dict[str, Any] = {
        "text": "",
        "token_ids": [],
        "finish_reason": "abort",
        "stop_reason": None,
    }
    return {
        "type": "output",
        "request_id": request_id,
        "outputs": [{"index": index, **entry} for index in range(num_sequences)],
        "finished": True,
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "cached_tokens": 0},
    }


_ERRORS_BY_CODE: dict[str, type[LoraplexError]] = {
    cls.code: cls
    for cls in (
        errors.AdapterError,
        errors.UnknownAdapterError,
        errors.QueueFullError,
        errors.ConfigError,
        errors.EngineDeadError,
        LoraplexError,
    )
}


def error_from_reply(code: str, text: str) -> LoraplexError:
    """The exception that stands for an error reply on the client's side."""
    cls = _ERRORS_BY_CODE.get(code)
    return cls(text) if cls is not None else client_error(code, text)
