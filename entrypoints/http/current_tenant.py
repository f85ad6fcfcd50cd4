"""The tenant whose key an HTTP request has shown."""

from contextvars import ContextVar

current_tenant: ContextVar[str] = ContextVar("current_tenant", default="")
"""The tenant of the HTTP request that the running task answers; "": the operator.

The gate sets it before the request reaches its route, so that no route can forget to pass it on.
"""
