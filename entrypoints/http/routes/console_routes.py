"""GET /: the console, a page without a build step. GET /loraplex/live: what it shows."""

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.staticfiles import StaticFiles

from loraplex.entrypoints.http.answer_response import EVENT_HEADERS
from loraplex.entrypoints.http.engine_link import EngineLink
from loraplex.entrypoints.http.live_events import LiveEvents
from loraplex.entrypoints.http.served_models import ServedModels
from loraplex.entrypoints.live.live_feed import LiveFeed

_FOLDER = files("loraplex.entrypoints.http") / "console"
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class ConsoleRoutes:
    """Serves the page, which holds no secrets, and the live view, which is for the operator."""

    def __init__(self, link: EngineLink, models: ServedModels) -> None:
        self._link = link
        self._live = LiveEvents(link.ask, lambda: LiveFeed(models.base))
        self._page = (_FOLDER / "index.html").read_bytes()
        self._files = StaticFiles(directory=str(_FOLDER))

    async def page(self, request: Request) -> Response:
        return Response(self._page, media_type="text/html", headers=_HEADERS)

    async def file(self, request: Request) -> Response:
        return await self._files.get_response(request.path_params["name"], request.scope)

    async def live(self, request: Request) -> Response:
        self._link.check_serving()
        self._live.check_room()
        headers = {name.decode(): value.decode() for name, value in EVENT_HEADERS}
        return StreamingResponse(self._live.watch(), headers=headers)
