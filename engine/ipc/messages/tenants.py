"""The tenants of an engine, as the supervisor tells them to its processes."""

from loraplex.scheduler.tenants.tenant import Tenant
from loraplex.scheduler.worker_protocol import Message


class TenantTable(Message):
    """Replaces all tenants and keys. A key itself never travels, its SHA-256 in hex does.

    A frontend that asks for CurveZMQ keys reads their folder again when another table comes.
    """

    tenants: list[Tenant] = []  # without the operator
    key_owners: dict[str, str] | None = None
    """Tenant by the SHA-256 of its API key; "": the operator. None: HTTP asks for no key."""
