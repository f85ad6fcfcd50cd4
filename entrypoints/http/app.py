"""The HTTP application: its routes, and the errors of all of them."""

from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from loraplex.engine.errors import ClientError
from loraplex.engine.ipc.messages.tenants import TenantTable
from loraplex.entrypoints.http.answer_response import error_response
from loraplex.entrypoints.http.api_key_gate import ApiKeyGate
from loraplex.entrypoints.http.engine_link import EngineLink
from loraplex.entrypoints.http.errors import HttpError, of_client_error
from loraplex.entrypoints.http.requests.body_reader import BodyReader
from loraplex.entrypoints.http.requests.request_ids import echoed_id
from loraplex.entrypoints.http.routes.adapter_routes import AdapterRoutes
from loraplex.entrypoints.http.routes.console_routes import ConsoleRoutes
from loraplex.entrypoints.http.routes.generation_routes import GenerationRoutes
from loraplex.entrypoints.http.routes.metrics_routes import MetricsRoutes
from loraplex.entrypoints.http.routes.server_routes import ServerRoutes
from loraplex.entrypoints.http.served_models import ServedModels

Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(link: EngineLink, tenants: Callable[[], TenantTable]) -> Starlette:
    """Returns the application that serves one engine. `tenants` returns those of now."""
    models = ServedModels(link.config)
    bodies = BodyReader(max_bytes=link.config.server.max_message_bytes)
    generation = GenerationRoutes(link, models, bodies)
    adapters = AdapterRoutes(link, models, bodies)
    server = ServerRoutes(link, bodies)
    metrics = MetricsRoutes(link)
    console = ConsoleRoutes(link, models)
    posts: dict[str, Endpoint] = {
        "/v1/completions": generation.completions,
        "/v1/chat/completions": generation.chat_completions,
        "/tokenize": server.tokenize,
        "/detokenize": server.detokenize,
        "/v1/load_lora_adapter": adapters.load,
        "/v1/unload_lora_adapter": adapters.unload,
        "/v1/pin_lora_adapter": adapters.pin,
        "/v1/unpin_lora_adapter": adapters.unpin,
        "/load_lora_adapter": adapters.load_as_sglang,
        "/unload_lora_adapter": adapters.unload_as_sglang,
    }
    gets: dict[str, Endpoint] = {
        "/v1/models": adapters.list_models,
        "/v1/models/{name:path}": adapters.get_model,
        "/v1/lora_adapters": adapters.list_adapters,
        "/v1/lora_adapters/{name:path}": adapters.get_adapter,
        "/version": server.version,
        "/health": server.health,
        "/ready": server.ready,
        "/metrics": metrics.metrics,
        "/": console.page,
        "/console/{name:path}": console.file,
        "/loraplex/live": console.live,
    }
    return Starlette(
        routes=[
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()),
            *(Route(path, endpoint, methods=["GET"]) for path, endpoint in gets.items()),
        ],
        middleware=[Middleware(ApiKeyGate, tenants=tenants)],
        exception_handlers={
            HttpError: _on_http_error,
            ClientError: _on_client_error,
            HTTPException: _on_starlette_error,
            ClientDisconnect: _on_disconnect,
            Exception: _on_fault,
        },
    )


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HttpError)
    return error_response(error, echoed_id(request))


async def _on_client_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ClientError)
    return error_response(of_client_error(error), echoed_id(request))


async def _on_starlette_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = f"{error.detail}: {request.method} {request.url.path[:200]}"
    return error_response(HttpError(error.status_code, text), echoed_id(request))


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # nobody reads it


async def _on_fault(request: Request, error: Exception) -> Response:
    """Answers; Starlette then raises the error again, and uvicorn logs it."""
    failure = HttpError(500, "internal error: see the server's log")
    return error_response(failure, echoed_id(request))
