"""Which adapter a name means for a tenant, where stores hold adapters too.

First comes a name that the operator or the tenant has registered, then what a store has, then a
name that another tenant has registered.
"""

from collections.abc import Iterable, Mapping
from heapq import nsmallest
from urllib.parse import quote

from loraplex.scheduler.adapters.version import AdapterVersion
from loraplex.scheduler.frontend_protocol import AdapterSource
from loraplex.scheduler.request import RequestRefused

MAX_LISTED = 20  # names in an error
PRIVATE = "@"  # no name of a client begins with it


def private_name(tenant: str, name: str) -> str:
    """Returns the name under which the registry holds an adapter that one tenant alone may use."""
    return f"{PRIVATE}{quote(tenant, safe='')}/{name}"


def found_name(
    name: str, registered: AdapterVersion | None, source: AdapterSource, tenant: str
) -> tuple[str, str]:
    """Return the registry's name and the owner of what a store has under a tenant's name.

    It is the tenant's alone if the store's folder is, or if another tenant has registered the name.
    """
    is_taken = registered is not None and not registered.source.is_from_store
    if source.owner or is_taken:
        return private_name(tenant, name), tenant
    return name, ""


def goes_before_stores(version: AdapterVersion | None, tenant: str) -> bool:
    """Tell whether the operator or the tenant has registered this version."""
    return (
        version is not None and not version.source.is_from_store and version.owner in ("", tenant)
    )


def visible(by_name: Mapping[str, AdapterVersion], name: str, tenant: str) -> AdapterVersion | None:
    """Return what a name means for a tenant, None if it is unknown."""
    version = by_name.get(name)
    if not tenant or goes_before_stores(version, tenant):
        return version
    return by_name.get(private_name(tenant, name)) or version


def unknown_adapter(name: str, names: Iterable[str]) -> RequestRefused:
    """Return the error for a name that is not among `names`."""
    public = [known for known in names if not known.startswith(PRIVATE)]
    more = ", ..." if len(public) > MAX_LISTED else ""
    listed = ", ".join(nsmallest(MAX_LISTED, public)) + more
    return RequestRefused(
        "unknown_adapter",
        f"no adapter is registered as {name!r}; known: {listed or 'none'}",
    )
