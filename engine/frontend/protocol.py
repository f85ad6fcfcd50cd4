"""Messages between clients and a frontend, see docs/reference/protocol.md.

The frontend parses each message into one of the classes of CLIENT_MESSAGES. Input that does not
fit raises a ClientError with an error code.
"""

from array import array
from dataclasses import MISSING, dataclass, field, fields, replace
from itertools import islice
from typing import Any

from loraplex.engine.errors import ClientError, client_error
from loraplex.engine.frontend import field_checks
from loraplex.engine.frontend.bounded_msgpack import MAX_ELEMENTS, TooManyElementsError, unpack
from loraplex.engine.frontend.field_checks import MAX_ID_CHARS, short
from loraplex.engine.frontend.mixing.adapter_use import AdapterUse, adapter_uses
from loraplex.engine.frontend.sampling_params import RequestOutputKind, SamplingParams
from loraplex.engine.frontend.uploads.upload_request import LoadAdapterTensorsRequest
from loraplex.engine.ipc.messages.pool_map import MAX_POOL_CELLS

PROTOCOL_VERSION = 1
MAX_ERROR_CHARS = 1000

_ID = {"check": field_checks.text(MAX_ID_CHARS, empty=False)}
_TENANT = {"check": field_checks.text(MAX_ID_CHARS)}
_FLAG = {"check": field_checks.boolean}
_MAPS = {"check": field_checks.list_of_maps}
_ANY_TEXT = {"check": field_checks.text(1 << 30)}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """Asks for completions of one prompt.

    Exactly one of `prompt`, `prompt_token_ids` and `messages` is set.
    """

    request_id: str = field(metadata=_ID)
    prompt: str | None = field(default=None, metadata=_ANY_TEXT)
    prompt_token_ids: "array[int] | None" = field(
        default=None, metadata={"check": field_checks.token_ids}
    )
    messages: list[dict[str, Any]] | None = field(
        default=None, metadata={"check": field_checks.conversation}
    )
    add_generation_prompt: bool = field(default=True, metadata=_FLAG)
    continue_final_message: bool = field(default=False, metadata=_FLAG)
    tools: list[dict[str, Any]] | None = field(default=None, metadata=_MAPS)
    documents: list[dict[str, Any]] | None = field(default=None, metadata=_MAPS)
    chat_template_kwargs: dict[str, Any] = field(
        default_factory=dict, metadata={"check": field_checks.template_variables}
    )
    sampling_params: SamplingParams = field(
        default_factory=SamplingParams, metadata={"check": SamplingParams.from_wire}
    )
    adapter: str = field(default="", metadata={"check": field_checks.optional_adapter_name})
    adapter_path: str = field(default="", metadata={"check": field_checks.text(4096)})
    load_inplace: bool = field(default=False, metadata=_FLAG)
    adapters: tuple[AdapterUse, ...] = field(default=(), metadata={"check": adapter_uses})
    salt: str = field(default="", metadata={"check": field_checks.text(MAX_ID_CHARS)})
    tenant: str = field(default="", metadata=_TENANT)
    priority: int = field(default=0, metadata={"check": field_checks.int32})
    stream: bool = field(default=True, metadata=_FLAG)
    timeout_s: float | None = field(default=None, metadata={"check": field_checks.seconds})
    use_prefix_cache: bool = field(default=True, metadata=_FLAG)
    return_prompt_token_ids: bool = field(default=False, metadata=_FLAG)

    @property
    def adapter_label(self) -> str:
        """Returns what logs and errors call its adapters; empty: the base model."""
        return self.adapter or "+".join(sorted(use.name for use in self.adapters))

    @property
    def final_only(self) -> bool:
        """Tells whether the client wants one message, at the end."""
        kind = self.sampling_params.output_kind
        return not self.stream or kind is RequestOutputKind.FINAL_ONLY

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
        if self.adapter_path and not self.adapter:
            raise ValueError("adapter_path needs adapter: give the folder a name")
        if self.adapters and self.adapter:
            raise ValueError("give adapter or adapters, not both")
        if self.add_generation_prompt and self.continue_final_message:
            raise ValueError(
                "continue_final_message needs add_generation_prompt=false: "
                "the answer continues the last message instead of starting a new one"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelRequest:
    """Ends the request that has this id."""

    request_id: str = field(metadata=_ID)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadAdapterRequest:
    """Registers an adapter; with `lazy` its files are read on first use."""

    request_id: str = field(metadata=_ID)
    name: str = field(metadata={"check": field_checks.adapter_name})
    path: str = field(metadata={"check": field_checks.text(4096, empty=False)})
    lazy: bool = field(default=False, metadata=_FLAG)
    tenant: str = field(default="", metadata=_TENANT)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadAdapterRequest:
    request_id: str = field(metadata=_ID)
    name: str = field(metadata={"check": field_checks.adapter_name})
    tenant: str = field(default="", metadata=_TENANT)


@dataclass(frozen=True, slots=True, kw_only=True)
class PinAdapterRequest:
    request_id: str = field(metadata=_ID)
    name: str = field(metadata={"check": field_checks.adapter_name})
    tenant: str = field(default="", metadata=_TENANT)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpinAdapterRequest:
    request_id: str = field(metadata=_ID)
    name: str = field(metadata={"check": field_checks.adapter_name})
    tenant: str = field(default="", metadata=_TENANT)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListAdaptersRequest:
    """Asks for one adapter, or for all if `name` is empty."""

    request_id: str = field(metadata=_ID)
    name: str = field(default="", metadata={"check": field_checks.optional_adapter_name})
    tenant: str = field(default="", metadata=_TENANT)


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthRequest:
    request_id: str = field(metadata=_ID)


@dataclass(frozen=True, slots=True, kw_only=True)
class StatsRequest:
    """Asks for statistics. A tenant gets no rows of adapters, which may be those of others."""

    request_id: str = field(metadata=_ID)
    by_tier: bool = field(default=False, metadata=_FLAG)
    tenant: str = field(default="", metadata=_TENANT)
    pool_cells: int = field(default=0, metadata={"check": field_checks.integer(0, MAX_POOL_CELLS)})

    @property
    def rows_key(self) -> str:
        """The key of the rows in the answer."""
        return "adapters_by_tier" if self.by_tier else "resident_adapters"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetPrefixCacheRequest:
    """Empties the prefix cache. The reply is that to "stats", from after it."""

    request_id: str = field(metadata=_ID)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """Asks for a "pong". It has no request id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bye:
    """Says that the client leaves. Its requests are cancelled; there is no reply."""


ClientMessage = (
    GenerateRequest
    | CancelRequest
    | LoadAdapterRequest
    | LoadAdapterTensorsRequest
    | UnloadAdapterRequest
    | PinAdapterRequest
    | UnpinAdapterRequest
    | ListAdaptersRequest
    | HealthRequest
    | StatsRequest
    | ResetPrefixCacheRequest
    | Ping
    | Bye
)
NamedAdapter = UnloadAdapterRequest | PinAdapterRequest | UnpinAdapterRequest | ListAdaptersRequest
FinalMessage = CancelRequest | HealthRequest | Ping | Bye
AdapterLoad = LoadAdapterRequest | LoadAdapterTensorsRequest
TenantMessage = GenerateRequest | AdapterLoad | NamedAdapter | StatsRequest
CLIENT_MESSAGES: dict[str, type] = {
    "generate": GenerateRequest,
    "cancel": CancelRequest,
    "load_adapter": LoadAdapterRequest,
    "load_adapter_tensors": LoadAdapterTensorsRequest,
    "unload_adapter": UnloadAdapterRequest,
    "pin_adapter": PinAdapterRequest,
    "unpin_adapter": UnpinAdapterRequest,
    "list_adapters": ListAdaptersRequest,
    "health": HealthRequest,
    "stats": StatsRequest,
    "reset_prefix_cache": ResetPrefixCacheRequest,
    "ping": Ping,
    "bye": Bye,
}


def decode_frame(frame: "bytes | memoryview", max_elements: int = MAX_ELEMENTS) -> dict[str, Any]:
    """Decodes one frame of a client to a map. Raises ClientError "malformed" or "too_large"."""
    try:
        message = unpack(frame, max_elements)
    except TooManyElementsError as error:
        raise client_error("too_large", str(error)) from None
    except Exception as error:  # msgpack raises exceptions of many classes for bad bytes
        text = str(error)[:200] or field_checks.type_name(error)
        raise client_error("malformed", f"not a MessagePack map: {text}") from None
    if not isinstance(message, dict):
        raise client_error(
            "malformed", f"a message must be a map, got {field_checks.type_name(message)}"
        )
    return message


def parse(message: dict[str, Any]) -> ClientMessage:
    """Checks a decoded map. Raises ClientError "malformed", "version" or "bad_request"."""
    message = dict(message)
    version = message.pop("version", PROTOCOL_VERSION)
    if version != PROTOCOL_VERSION or isinstance(version, bool):
        raise client_error(
            "version",
            f"this server speaks protocol version {PROTOCOL_VERSION}, got version {short(version)}",
        )
    name = message.pop("type", None)
    cls = CLIENT_MESSAGES.get(name) if isinstance(name, str) else None
    if cls is None:
        raise client_error(
            "malformed", f'"type" must be one of {", ".join(CLIENT_MESSAGES)}, got {short(name)}'
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
        extra = ", ".join(map(short, islice(message, 5)))
        raise ClientError(f"{name} does not take {extra}; it takes {known}")
    try:
        parsed: ClientMessage = cls(**values)
    except (TypeError, ValueError) as error:
        raise ClientError(str(error)) from None
    return parsed


def for_tenant(message: ClientMessage, sender: str) -> ClientMessage:
    """Returns the message with the tenant for whom it is done.

    Args:
        sender: the tenant that the client's key belongs to; empty: the operator, who may act for
            any tenant.

    Raises:
        ClientError: a tenant acts for another one or for all, or its request wants to go before
            others (code "forbidden").
    """
    if sender and isinstance(message, ResetPrefixCacheRequest):
        raise client_error("forbidden", "reset_prefix_cache: only the operator may send it")
    if sender and isinstance(message, StatsRequest) and message.pool_cells:
        raise client_error("forbidden", "pool_cells: only the operator may ask for the map")
    if not isinstance(message, TenantMessage):
        return message
    if sender and message.tenant not in ("", sender):
        raise client_error(
            "forbidden",
            f"tenant: this client's key is that of {sender!r}, so it cannot act for "
            f"{short(message.tenant)}: leave tenant out",
        )
    if sender and not message.tenant:
        message = replace(message, tenant=sender)
    if isinstance(message, GenerateRequest) and message.tenant and message.priority < 0:
        raise client_error(
            "forbidden",
            f"priority: 0 or more, got {message.priority}: only the operator may go before others",
        )
    return message


def _checked(name: str, check: field_checks.Check, value: Any) -> Any:
    try:
        return check(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ClientError(f"{name}: {str(error)[:MAX_ERROR_CHARS]}") from None


def request_id_of(message: dict[str, Any]) -> str:
    """Returns the request id for an error reply, "" if the message has none."""
    request_id = message.get("request_id")
    return request_id[:MAX_ID_CHARS] if isinstance(request_id, str) else ""


def error_reply(request_id: str, code: str, text: str, **details: float) -> dict[str, Any]:
    return {
        "type": "error",
        "request_id": request_id,
        "code": code,
        "message": text[:MAX_ERROR_CHARS],
        **details,
    }


def aborted_reply(request_id: str, num_sequences: int) -> dict[str, Any]:
    """Returns the last output of a request that was cancelled before it was tokenized."""
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
