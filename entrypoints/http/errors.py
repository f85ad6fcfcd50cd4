"""Errors of the HTTP server, in OpenAI's shape."""

from typing import Any

from loraplex.engine.errors import ClientError

_STATUS = {
    "bad_request": 400,
    "malformed": 400,
    "prompt_too_long": 400,
    "adapter": 400,
    "forbidden": 403,
    "unknown_adapter": 404,
    "too_large": 413,
    "queue_full": 429,
    "too_many_requests": 429,
    "too_many_adapters": 429,
    "deadline": 503,
    "engine_dead": 503,
}
"""HTTP status by the error code of docs/reference/protocol.md. Any other code is 500."""

_TYPES = {
    400: "BadRequestError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
}


class HttpError(Exception):
    """An answer that is an error. `param` names the field of the body that is at fault."""

    def __init__(
        self, status: int, text: str, *, param: str | None = None, kind: str | None = None
    ) -> None:
        super().__init__(text)
        self.status = status
        self.param = param
        self.kind = kind or _TYPES.get(status, "InternalServerError")

    @property
    def body(self) -> dict[str, Any]:
        """The body in OpenAI's shape; `code` is the status, as in vLLM."""
        return {
            "error": {
                "message": str(self),
                "type": self.kind,
                "param": self.param,
                "code": self.status,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """Tells clients when to try again, where that can help."""
        return {"retry-after": "1"} if self.status in (429, 503) else {}


def http_error(code: str, text: str) -> HttpError:
    """Returns the HTTP error for an error code of the frontend."""
    return HttpError(_STATUS.get(code, 500), text.removeprefix("sampling_params: "))


def of_client_error(error: ClientError) -> HttpError:
    return http_error(error.code, str(error))


def unknown_model(name: str) -> HttpError:
    return HttpError(404, f"The model `{name}` does not exist.", param="model")
