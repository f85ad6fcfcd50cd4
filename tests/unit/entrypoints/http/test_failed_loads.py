"""A load that fails, while another frontend loads an adapter under the same name."""

import asyncio
from typing import Any, cast

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from loraplex.engine.config import EngineConfig
from loraplex.entrypoints.http.answer_response import error_response
from loraplex.entrypoints.http.engine_link import EngineLink
from loraplex.entrypoints.http.errors import HttpError
from loraplex.entrypoints.http.requests.body_reader import BodyReader
from loraplex.entrypoints.http.routes.adapter_routes import AdapterRoutes
from loraplex.entrypoints.http.served_models import ServedModels


class Link:
    """Knows no adapter until a load has failed. Then the name has the `error` it was given."""

    def __init__(self, error: str) -> None:
        self.unloaded: list[str] = []
        self._error = error
        self._has_failed = False

    async def ask(self, kind: str, **values: Any) -> dict[str, Any]:
        if kind == "load_adapter":
            self._has_failed = True
            raise HttpError(400, "no adapter")
        if kind == "unload_adapter":
            self.unloaded.append(values["name"])
        elif not self._has_failed:
            raise HttpError(404, "unknown")
        return {"adapters": [{"name": "x", "path": "p", "error": self._error}]}


async def load(link: Link) -> int:
    models = ServedModels(EngineConfig())
    routes = AdapterRoutes(cast(EngineLink, link), models, BodyReader(max_bytes=1000))

    async def on_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HttpError)
        return error_response(error)

    app = Starlette(
        routes=[Route("/load", routes.load, methods=["POST"])],
        exception_handlers={HttpError: on_error},
    )
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.post("/load", json={"lora_name": "x", "lora_path": "y"})
    return response.status_code


@pytest.mark.parametrize(("error", "unloaded"), [("no adapter", ["x"]), ("", [])])
def test_only_a_name_that_failed_is_removed(error: str, unloaded: list[str]) -> None:
    link = Link(error)
    assert asyncio.run(load(link)) == 400
    assert link.unloaded == unloaded
