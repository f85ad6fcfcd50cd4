"""Errors by who may see them and who is to act."""


class LoraplexError(Exception):
    """Base of every error that the engine raises on purpose. `code` travels on the wire."""

    code = "internal"


class ClientError(LoraplexError):
    """The request is at fault; its text is shown to the client as it is."""

    code = "bad_request"


def client_error(code: str, text: str) -> ClientError:
    """A ClientError that travels under a code of its own."""
    error = ClientError(text)
    error.code = code
    return error


class AdapterError(ClientError):
    """An adapter cannot be served; the text names the adapter and the reason."""

    code = "adapter"


class UnknownAdapterError(AdapterError):
    code = "unknown_adapter"


class QueueFullError(ClientError):
    """The engine has no room now; the same request may go through later."""

    code = "queue_full"


class ConfigError(LoraplexError):
    """The engine cannot start as configured; the text says what to change."""

    code = "config"


class EngineDeadError(LoraplexError):
    """A process of the engine ended; everything it held has failed."""

    code = "engine_dead"
