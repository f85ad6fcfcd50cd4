"""Reads and checks the JSON body of an HTTP request at a bounded cost."""

import asyncio
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from loraplex.engine.frontend.bounded_msgpack import MAX_ELEMENTS
from loraplex.engine.frontend.byte_budget import ByteBudget
from loraplex.entrypoints.http.errors import HttpError
from loraplex.entrypoints.http.requests.entry_counter import EntryCounter, num_separators

MAX_BODIES = 256 << 20  # bytes of all bodies that are being read
PIECE_BYTES = 1 << 16  # of a body that are looked at in one turn of the event loop
PATIENCE_S = 30.0
MIN_BYTES_A_SECOND = 64 << 10
MAX_ERRORS = 1000  # pydantic describes all errors or none; 260,000 take it 0.6 s
_READER = b"all"

Body = TypeVar("Body", bound=BaseModel)


class BodyReader:
    """Limits the size of each body, the bytes of all of them, and the entries of each."""

    def __init__(
        self, *, max_bytes: int, max_elements: int = MAX_ELEMENTS, patience_s: float = PATIENCE_S
    ) -> None:
        """A body may take `patience_s`, and a second more for each MIN_BYTES_A_SECOND of it."""
        self._patience_s = patience_s
        self._max_bytes = max_bytes
        self._max_elements = max_elements
        self._budget = ByteBudget(for_each=MAX_BODIES, in_all=max(MAX_BODIES, max_bytes))

    async def read(self, request: Request, cls: type[Body]) -> Body:
        """Returns the body as an object of `cls`.

        Raises:
            HttpError: the body is no JSON, does not fit `cls`, is too large or comes too slowly.
            ClientDisconnect: the client left before the end of the body.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # It also keeps out web pages, which may send other types to any address.
            raise HttpError(415, "the body must be JSON: send Content-Type: application/json")
        body = await self._read_bytes(request)
        await self._check_elements(body)
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            raise _of_validation(error) from None

    async def _read_bytes(self, request: Request) -> bytes:
        length = request.headers.get("content-length", "")
        self._check_size(int(length) if length.isdecimal() else 0)
        parts: list[bytes] = []
        num_bytes = 0
        end = asyncio.get_running_loop().time() + self._patience_s
        try:
            async with asyncio.timeout_at(end) as limit:
                async for part in request.stream():
                    if not self._budget.take(_READER, len(part)):
                        raise HttpError(429, "too many bodies are being read: try again later")
                    num_bytes += len(part)
                    parts.append(part)
                    self._check_size(num_bytes)
                    limit.reschedule(end + num_bytes / MIN_BYTES_A_SECOND)
            return b"".join(parts)
        except TimeoutError:
            raise HttpError(408, "the body came too slowly: send the request again") from None
        finally:
            self._budget.give_back(_READER, num_bytes)

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise HttpError(
                413,
                f"the body has more than {self._max_bytes} bytes: send less, or raise "
                "max_message_bytes of the server",
            )

    async def _check_elements(self, body: bytes) -> None:
        """Counts the entries of lists and maps without building them."""
        if num_separators(body) <= self._max_elements:
            return  # without a look at which are inside strings
        counter = EntryCounter()
        for start in range(0, len(body), PIECE_BYTES):
            counter.add(body[start : start + PIECE_BYTES])
            if counter.num_entries > self._max_elements:
                raise HttpError(
                    413,
                    f"the body has more than {self._max_elements} list and map entries: "
                    "send less at once",
                )
            await asyncio.sleep(0)


def _of_validation(error: ValidationError) -> HttpError:
    if error.error_count() > MAX_ERRORS:
        return HttpError(400, f"the body has {error.error_count():,} values of wrong types")
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    text = f"{where}: {first['msg']}" if where else first["msg"]
    return HttpError(400, text, param=where or None)
