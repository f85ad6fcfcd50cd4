"""Sends the answer of the engine as an HTTP response."""

import asyncio

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loraplex.entrypoints.http.answers.base_answer import DONE, event, to_json
from loraplex.entrypoints.http.errors import HttpError
from loraplex.entrypoints.http.exchange import Exchange
from loraplex.entrypoints.http.requests.request_ids import HEADER

EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx holds back streams otherwise
]


class JsonResponse(Response):
    """A JSON object with a status."""

    media_type = "application/json"

    def __init__(
        self, value: object, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(to_json(value), status_code=status, headers=headers)


def error_response(error: HttpError, request_id: str = "") -> JsonResponse:
    """Returns the answer to a request that fails; "" for an id that is not known."""
    headers = {**error.headers, **({HEADER: request_id} if request_id else {})}
    return JsonResponse(error.body, error.status, headers)


class AnswerResponse(Response):
    """Streams or sends an answer, and cancels its requests if the client leaves.

    It waits for the first bytes before it begins, so that an error before them has its status. A
    later one is an event of the stream.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.background = None
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = self._exchange
        watch = asyncio.create_task(self._close_on_disconnect(receive))
        try:
            try:
                data = await exchange.read()
            except HttpError as error:
                await error_response(error, exchange.request_id)(scope, receive, send)
                return
            if not data:
                return  # the client has left
            if exchange.streams:
                await self._stream(data, send)
            else:
                headers = {HEADER: exchange.request_id}
                answer = Response(data, media_type="application/json", headers=headers)
                await answer(scope, receive, send)
        finally:
            watch.cancel()
            exchange.close()

    async def _stream(self, data: bytes, send: Send) -> None:
        headers = [*EVENT_HEADERS, (HEADER.encode(), self._exchange.request_id.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while data:
            ends = self._exchange.ended and self._exchange.failure is None
            await send({"type": "http.response.body", "body": data, "more_body": not ends})
            if ends:
                return
            try:
                data = await self._exchange.read()
            except HttpError as error:
                data = event(error.body) + DONE
                await send({"type": "http.response.body", "body": data, "more_body": False})
                return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _close_on_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._exchange.close()
