"""The errors that the engine raises on purpose, by whoever can mend them."""


class LoraplexError(Exception):
    """Base class of all of them. `code` names the kind in messages to clients."""

    code = "internal"


class ClientError(LoraplexError, ValueError):
    """A request cannot be served as it is; the client gets the text unchanged.

    It is a ValueError, which vLLM raises for such requests.
    """

    code = "bad_request"


def client_error(code: str, text: str) -> ClientError:
    """Returns a ClientError with this code."""
    error = ClientError(text)
    error.code = code
    return error


class AdapterError(ClientError):
    """An adapter cannot be served; the text names the adapter and the reason."""

    code = "adapter"


class UnknownAdapterError(AdapterError):
    """No adapter is registered under the name that a request gives."""

    code = "unknown_adapter"


class QueueFullError(ClientError):
    """The engine has no room for the request now; the client may send it again later."""

    code = "queue_full"


class ConfigError(LoraplexError):
    """The engine cannot start as configured; the text says what to change."""

    code = "config"


class EngineDeadError(LoraplexError):
    """A process of the engine has ended; its requests have failed."""

    code = "engine_dead"


class ConnectionLostError(EngineDeadError):
    """The connection to the frontend broke; the unfinished requests of the client have failed.

    The engine may live: its frontend is started again at the same address. The client's next call
    connects anew.
    """

    code = "connection_lost"


_BY_CODE: dict[str, type[LoraplexError]] = {
    cls.code: cls
    for cls in (
        AdapterError,
        UnknownAdapterError,
        QueueFullError,
        ConfigError,
        EngineDeadError,
        LoraplexError,
    )
}


def error_from_reply(code: str, text: str) -> LoraplexError:
    """Returns the exception that a client raises for an error reply."""
    cls = _BY_CODE.get(code)
    return cls(text) if cls is not None else client_error(code, text)
