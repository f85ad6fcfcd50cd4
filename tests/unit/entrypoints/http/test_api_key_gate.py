"""No route of the HTTP application works without a key where keys are set."""

import asyncio
from typing import Any, cast

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from loraplex.engine.config import EngineConfig
from loraplex.engine.ipc.messages.tenants import TenantTable
from loraplex.engine.tenants.api_key import key_hash
from loraplex.entrypoints.http.api_key_gate import OPEN_PATHS, OPEN_PREFIX, OPERATOR_PATHS
from loraplex.entrypoints.http.app import make_app
from loraplex.entrypoints.http.current_tenant import current_tenant
from loraplex.entrypoints.http.engine_link import EngineLink
from loraplex.entrypoints.http.errors import HttpError

ANN, ADMIN = "ann's key of 20 chars or more", "admin's key of 20 chars or more"
TABLE = TenantTable([], {key_hash(ANN): "ann", key_hash(ADMIN): ""})
BODIES: dict[str, Any] = {
    "lora_name": "x", "lora_path": "/x", "model": "x", "prompt": [1], "tokens": [1],
}  # fmt: skip


class Link:
    """Answers everything with 418, and remembers for whom it was asked."""

    config = EngineConfig()
    codec = None
    info = None
    created = 0

    def __init__(self) -> None:
        self.asked_for: list[str] = []

    async def ask(self, kind: str, **values: Any) -> dict[str, Any]:
        self.asked_for.append(current_tenant.get())
        raise HttpError(418, "asked")

    async def start(self, answer: Any, messages: list[dict[str, Any]]) -> Any:
        await self.ask("generate")

    def check_serving(self) -> None:
        self.asked_for.append(current_tenant.get())


@pytest.fixture
def link() -> Link:
    return Link()


@pytest.fixture
def app(link: Link) -> Starlette:
    return make_app(cast(EngineLink, link), lambda: TABLE)


def call(app: Starlette, method: str, path: str, authorization: str = "") -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            headers = {"authorization": authorization.encode("latin-1")} if authorization else {}
            json = BODIES if method == "POST" else None
            return await client.request(method, path, headers=headers, json=json)

    return asyncio.run(send())


def calls_of(app: Starlette) -> list[tuple[str, str]]:
    """Returns method and path of every route, and some that there are not."""
    calls = [("GET", "/unknown"), ("POST", "/health/"), ("GET", "/v1"), ("OPTIONS", "/v1/models")]
    for route in app.routes:
        assert isinstance(route, Route), "look at what this is, and whether the gate covers it"
        path = route.path.replace("{name:path}", "x")
        assert "{" not in path
        calls += [(method, path) for method in sorted(route.methods or ()) if method != "HEAD"]
    return calls


def is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIX)


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer ", f"Bearer {ANN}x", f"Basic {ANN}", ANN, f"Bearer {key_hash(ANN)}",
     "Bearer \xff"],
)  # fmt: skip
def test_nothing_but_probes_works_without_a_key(
    app: Starlette, link: Link, authorization: str
) -> None:
    calls = calls_of(app)
    assert len(calls) > 15
    for method, path in calls:
        response = call(app, method, path, authorization)
        if is_open(path):
            assert response.status_code in (200, 404, 418), path
            continue
        assert response.status_code == 401, path
        assert response.headers["www-authenticate"] == "Bearer"
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("AuthenticationError", 401)
        assert "key" in error["message"] and ANN not in error["message"]
    assert len(link.asked_for) == 2, "only /health and /ready reached the engine"


def test_the_key_says_whose_every_call_is(app: Starlette, link: Link) -> None:
    """No route forgets the tenant, and none works for everybody."""
    for authorization, tenant in [(f"Bearer {ANN}", "ann"), (f"bearer  {ADMIN} ", "")]:
        link.asked_for.clear()
        for method, path in calls_of(app):
            if not is_open(path):
                response = call(app, method, path, authorization)
                assert response.status_code not in (401, 500), path
                assert (response.status_code == 403) == bool(tenant and path in OPERATOR_PATHS)
        assert len(link.asked_for) > 8
        assert set(link.asked_for) == {tenant}


def test_paths_of_the_operator(app: Starlette, link: Link) -> None:
    for path in OPERATOR_PATHS:
        assert call(app, "GET", path, f"Bearer {ANN}").status_code == 403
        assert call(app, "GET", path, f"Bearer {ADMIN}").status_code != 403


def test_keys_are_those_of_the_moment(link: Link) -> None:
    tables = [TenantTable()]
    app = make_app(cast(EngineLink, link), lambda: tables[-1])
    path, authorization = "/v1/models", f"Bearer {ANN}"
    assert call(app, "GET", path).status_code == 418  # nobody needs a key
    tables.append(TABLE)
    assert call(app, "GET", path).status_code == 401
    assert call(app, "GET", path, authorization).status_code == 418
    tables.append(TenantTable([], {}))
    assert call(app, "GET", path, authorization).status_code == 401
    assert link.asked_for == ["", "ann"]
