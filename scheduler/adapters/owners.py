"""The tenants that registered the adapters' names: what they may do, and how many names they have.

Any tenant may use any adapter by its name. The operator's tenant is the empty text; it may do all.
"""

from collections import Counter
from collections.abc import Iterable

from loraplex.memory.accounting.block_manager import IntegrityError
from loraplex.scheduler.adapters.version import AdapterVersion
from loraplex.scheduler.frontend_protocol import AdapterSource
from loraplex.scheduler.request import RequestRefused


class AdapterOwners:
    """Counts the names of each tenant, up to `max_names`. The operator's are not limited."""

    def __init__(self, max_names: int) -> None:
        self._max_names = max_names
        self._num_names: Counter[str] = Counter()

    def owner_after(
        self, current: AdapterVersion | None, source: AdapterSource, tenant: str
    ) -> str:
        """Return the owner of a name once the tenant has given it the folder `source`.

        Any tenant may name the folder again that the name means already.

        Args:
            current: what the name means now, None if it is new.

        Raises:
            RequestRefused: the name is another's, or the tenant may register no more.
        """
        if current is not None:
            if not current.is_at(source):
                check_owner(current, tenant, "replace")
            return current.owner
        self.check_room(tenant)
        return tenant

    def check_room(self, tenant: str) -> None:
        """Raise RequestRefused if the tenant may register no more names."""
        if tenant and self._num_names[tenant] >= self._max_names:
            raise RequestRefused(
                "too_many_adapters",
                f"tenant {tenant!r} has registered {self._max_names} adapters, as many as "
                "max_adapters_per_tenant allows: unload one first",
            )

    def add(self, version: AdapterVersion) -> None:
        """Count a new name."""
        self._num_names[version.owner] += 1

    def remove(self, version: AdapterVersion) -> None:
        """Count a name less."""
        self._num_names[version.owner] -= 1
        if not self._num_names[version.owner]:
            del self._num_names[version.owner]

    def check_integrity(self, named: Iterable[AdapterVersion]) -> None:
        """Raise IntegrityError unless the counts are those of the `named` versions."""
        if Counter(version.owner for version in named) != self._num_names:
            raise IntegrityError("the adapter names of a tenant are counted wrongly")


def check_owner(version: AdapterVersion, tenant: str, verb: str) -> None:
    """Raise RequestRefused unless the tenant is the owner or the operator."""
    if tenant and tenant != version.owner:
        raise RequestRefused(
            "forbidden",
            f"tenant {tenant!r} may not {verb} adapter {version.name!r}, which it does not own: "
            "use a name of your own, or ask the operator",
        )
