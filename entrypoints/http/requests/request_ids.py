"""The ids of HTTP requests, which clients may choose."""

import re
import secrets

from starlette.requests import Request

from loraplex.entrypoints.http.errors import HttpError

HEADER = "x-request-id"
_ALLOWED = re.compile(r"[!-~]{1,200}")  # printable ASCII without spaces: it becomes a header


def request_id_of(request: Request, of_body: str | None) -> str:
    """Returns the header X-Request-Id, or else the body's `request_id`, or else a new id.

    Raises:
        HttpError: the id has other characters, or is too long.
    """
    chosen = request.headers.get(HEADER) or of_body
    if chosen is None:
        return secrets.token_hex(16)
    if not _ALLOWED.fullmatch(chosen):
        raise HttpError(
            400, "a request id must have 1 to 200 printable ASCII characters", param="request_id"
        )
    return chosen


def echoed_id(request: Request) -> str:
    """Returns the header X-Request-Id for the answer to a request that is refused; "" if unfit."""
    chosen = request.headers.get(HEADER, "")
    return chosen if _ALLOWED.fullmatch(chosen) else ""


def prompt_ids(request_id: str, num_prompts: int) -> list[str]:
    """Returns the ids of the engine's requests, one for each prompt."""
    return [request_id] if num_prompts == 1 else [f"{request_id}-{i}" for i in range(num_prompts)]


def index_of(prompt_id: str, num_prompts: int) -> int:
    """Returns the number of a prompt, from its id."""
    return 0 if num_prompts == 1 else int(prompt_id.rpartition("-")[2])
