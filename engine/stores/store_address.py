"""The address of a store, in which {tenant} may stand for who asks."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from loraplex.engine.errors import ClientError, ConfigError, client_error
from loraplex.engine.store_config import TENANT

_TENANT_NAME = re.compile(r"[\w.@+-]+")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//|:)")


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """A folder, bucket or organization that holds adapters by their names.

    Attributes:
        root: the address without a slash at its end; an absolute path for a folder.
        scheme: text before "://", "file" for a folder.
    """

    root: str
    scheme: str

    @classmethod
    def parse(cls, uri: str) -> "StoreAddress":
        """Raises ConfigError if {tenant} is not a whole part between slashes."""
        uri = uri.strip()
        found = _SCHEME.match(uri)
        scheme = found[1].lower() if found else "file"
        if scheme == "file":
            uri = os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))
        for part in uri.split("/"):
            if TENANT in part and part != TENANT:
                raise ConfigError(
                    f"adapter_store {uri}: {TENANT} must stand alone between slashes, as in "
                    f"s3://bucket/{TENANT}; {part!r} would let one tenant's name end in another's"
                )
        return cls(uri if uri.endswith("://") else uri.rstrip("/"), scheme)

    @property
    def is_private(self) -> bool:
        """Tells whether each tenant has a folder of its own."""
        return TENANT in self.root

    def folder(self, tenant: str) -> str | None:
        """Returns the address of the tenant's folder; None if the store has none for it.

        Raises:
            ClientError: the tenant's name cannot be a part of an address (code "forbidden").
        """
        if not self.is_private:
            return self.root
        if not tenant:
            return None
        if not _TENANT_NAME.fullmatch(tenant) or tenant in (".", ".."):
            raise client_error(
                "forbidden",
                f"tenant {tenant[:40]!r} cannot have a folder in an adapter store: its name must "
                "consist of letters, digits and . _ @ + -",
            )
        return self.root.replace(TENANT, tenant)

    def locate(self, name: str, tenant: str) -> str | None:
        """Returns the address of an adapter; raises ClientError as folder() and check_name()."""
        check_name(name)
        folder = self.folder(tenant)
        if folder is None:
            return None
        return folder + name if folder.endswith("/") else f"{folder}/{name}"

    @property
    def real_folder(self) -> str:
        """The path of a folder with links resolved in what comes before {tenant}."""
        fixed, _, rest = self.root.partition(TENANT)
        real = os.path.realpath(fixed)
        return os.path.join(real, TENANT + rest) if self.is_private else real

    @property
    def fixed_parts(self) -> list[str]:
        """The parts between slashes that come before {tenant}, else all."""
        fixed = self.root.partition(TENANT)[0].rstrip("/")
        if self.scheme == "file":
            fixed = os.path.realpath(fixed)
        return [part for part in fixed.split("/") if part]


def check_name(name: str) -> None:
    """Raises ClientError if the name could lead out of a store's folder."""
    if any(part in ("", ".", "..") for part in name.split("/")) or "\\" in name:
        raise ClientError(f"adapter {name[:200]!r}: no part of a name in a store may be . or ..")


def check_apart(addresses: Sequence[StoreAddress]) -> None:
    """Raises ConfigError if a name in one store could reach a tenant's folder of another."""
    for private in addresses:
        for other in addresses:
            fixed = other.fixed_parts
            is_above = private.fixed_parts[: len(fixed)] == fixed
            same = other.is_private and fixed == private.fixed_parts
            if private.is_private and is_above and not same:
                raise ConfigError(
                    f"adapter_store {other.root} lies above {private.root}: a name such as "
                    "TENANT/ADAPTER would read another tenant's files; put shared adapters beside "
                    "the folders of the tenants"
                )
