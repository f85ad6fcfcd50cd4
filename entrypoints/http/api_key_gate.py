"""Asks for API keys, and knows whose key an HTTP request has shown."""

from collections.abc import Callable, Mapping

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from loraplex.engine.ipc.messages.tenants import TenantTable
from loraplex.engine.tenants.api_key import key_hash
from loraplex.entrypoints.http.answer_response import error_response
from loraplex.entrypoints.http.current_tenant import current_tenant
from loraplex.entrypoints.http.errors import HttpError

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version"})
"""Need no key: probes and load balancers have none, and the console's page asks for one."""

OPEN_PREFIX = "/console/"
"""The files of the console's page, which hold no secrets."""

OPERATOR_PATHS = frozenset({"/loraplex/live", "/metrics"})
"""Show the work of all tenants, so they need the operator's key."""


class ApiKeyGate:
    """Answers 401 to requests without a known key. Sets `current_tenant` for the others.

    A key counts when the request comes: one that is revoked later does not end it.
    """

    def __init__(self, app: ASGIApp, tenants: Callable[[], TenantTable]) -> None:
        """`tenants` returns those of now."""
        self._app = app
        self._tenants = tenants

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        owners = self._tenants().key_owners
        if owners is not None and scope["type"] == "http":
            try:
                current_tenant.set(_tenant_of(scope, owners))
            except HttpError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _tenant_of(scope: Scope, owners: Mapping[str, str]) -> str:
    """Looks the key up by its hash, so that the time tells nothing about its text.

    Raises:
        HttpError: there is no key, or no such key (401), or it is not the operator's (403).
    """
    path = scope["path"]
    if path in OPEN_PATHS or path.startswith(OPEN_PREFIX):
        return ""
    scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        raise HttpError(401, "this server needs a key: send the header Authorization: Bearer KEY")
    tenant = owners.get(key_hash(key.strip()))
    if tenant is None:
        raise HttpError(401, "the API key is unknown or was revoked: ask the operator for another")
    if tenant and path in OPERATOR_PATHS:
        raise HttpError(403, f"{path} concerns all tenants: it needs the operator's key")
    return tenant
