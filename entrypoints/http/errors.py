"""Errors of the HTTP server, in OpenAI's shape."""

import math
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
    "rate_limited": 429,
    "deadline": 503,
    "draining": 503,
    "timeout": 504,
    "engine_dead": 503,
    "store_unavailable": 503,
}
"""HTTP status by the error code of docs/reference/protocol.md. Any other code is 500."""

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}


class HttpError(Exception):
    """An answer that is an error. `param` names the field of the body that is at fault.

    `retry_after_s` says when the same may be accepted; 0: not known.
    """

    def __init__(
        self,
        status: int,
        text: str,
        *,
        param: str | None = None,
        kind: str | None = None,
        retry_after_s: float = 0.0,
    ) -> None:
        super().__init__(text)
        self.status = status
        self.param = param
        self.retry_after_s = retry_after_s
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
        """Tells clients what key to bring, or when to try again."""
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        if self.status not in (429, 503):
            return {}
        return {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}


def http_error(code: str, text: str, *, retry_after_s: float = 0.0) -> HttpError:
    """Returns the HTTP error for an error code of the frontend."""
    text = text.removeprefix("sampling_params: ")
    return HttpError(_STATUS.get(code, 500), text, retry_after_s=retry_after_s)


def of_client_error(error: ClientError) -> HttpError:
    return http_error(error.code, str(error))


def unknown_model(name: str) -> HttpError:
    return HttpError(404, f"The model `{name}` does not exist.", param="model")
