"""Reads the file of ``--api-keys``: the tenants, their keys, weights and limits."""

import logging
import math
import os
import re
import stat
from collections.abc import Iterator
from typing import Annotated

import msgspec

from loraplex.engine.config import ServerConfig
from loraplex.engine.errors import ConfigError
from loraplex.engine.ipc.messages.tenants import TenantTable
from loraplex.engine.tenants.api_key import key_hash, key_problem
from loraplex.scheduler.tenants.tenant import Tenant

OPERATOR = "admin"
"""The tenant that may do all, as for CurveZMQ keys. It has no weight and no limits."""

MAX_NAME_CHARS = 256
HASH = re.compile("[0-9a-f]{64}")
Count = Annotated[int, msgspec.Meta(ge=1)]

logger = logging.getLogger("loraplex")


class KeyEntry(msgspec.Struct, forbid_unknown_fields=True):
    """One key: its text or its SHA-256 in hex."""

    key: str | None = None
    key_sha256: str | None = None


class Limits(msgspec.Struct, forbid_unknown_fields=True):
    """The limits of one tenant; see Tenant."""

    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    max_running_requests: Count | None = None


class TenantEntry(msgspec.Struct, forbid_unknown_fields=True):
    """One tenant of the file."""

    weight: float | None = None
    limits: Limits = msgspec.field(default_factory=Limits)
    keys: list[KeyEntry] = []


class KeyFile(msgspec.Struct, forbid_unknown_fields=True):
    """The whole file."""

    tenants: dict[str, TenantEntry]


def read_key_file(path: str) -> TenantTable:
    """Returns the tenants of a YAML or JSON file. Logs a warning if others may change or read it.

    Raises:
        ConfigError: the file cannot be read, or does not say exactly who has which key.
    """
    from loraplex.engine.tenants.strict_yaml import YAMLError, load_yaml  # few servers have keys

    try:
        with open(path, encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = msgspec.convert(load_yaml(file), KeyFile)
        table = _checked(content)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_keys {path} cannot be read: {error}") from None
    except YAMLError as error:
        raise ConfigError(f"api_keys {path} is neither YAML nor JSON: {error}") from None
    except ValueError as error:  # msgspec's too
        raise ConfigError(f"api_keys {path}: {error}") from None
    _warn_of_permissions(path, mode, content)
    return table


def read_tenants_of(config: ServerConfig) -> TenantTable:
    """Returns the tenants of the configured file, an empty table if there is none.

    Raises:
        ConfigError: the file is not as it must be, or the server could be used without a key.
    """
    if not config.api_keys:
        return TenantTable()
    is_open = config.endpoint.startswith("tcp://") and not config.client_public_keys_dir
    if is_open and not config.insecure:
        raise ConfigError(
            f"api_keys is given, but clients need no key at endpoint {config.endpoint}: give "
            "--endpoint ipc://PATH, which only this user can connect to, --client-public-keys-dir "
            "(CurveZMQ), or --insecure"
        )
    return read_key_file(config.api_keys)


def check_tenant_name(name: str) -> None:
    """Raises ValueError unless a tenant may be called so."""
    if not name or not name.isprintable() or len(name) > MAX_NAME_CHARS:
        raise ValueError(f"a tenant's name has 1 to {MAX_NAME_CHARS} printable characters")


def _checked(content: KeyFile) -> TenantTable:
    """Raises ValueError with the place and the mend."""
    owners: dict[str, str] = {}
    tenants: list[Tenant] = []
    for name, entry in content.tenants.items():
        check_tenant_name(name)
        for place, digest in _hashes(name, entry):
            if digest in owners:
                whose = owners[digest] or OPERATOR
                raise ValueError(f"{place}: tenant {whose!r} has this key already: remove one")
            owners[digest] = "" if name == OPERATOR else name
        tenant = Tenant(name, entry.weight, **msgspec.structs.asdict(entry.limits))
        if entry.weight is not None and not 0 < entry.weight < math.inf:
            raise ValueError(f"tenants.{name}.weight: a weight is a positive number")
        if name != OPERATOR:
            tenants.append(tenant)
        elif tenant.is_limited or entry.weight is not None:
            raise ValueError(
                f"tenants.{OPERATOR}: this is the operator, who has no weight and no limits: "
                "remove them, or use another name"
            )
    return TenantTable(tenants, owners)


def _hashes(name: str, entry: TenantEntry) -> Iterator[tuple[str, str]]:
    """Yields the place of each key in the file, for errors, and its hash."""
    for number, key in enumerate(entry.keys):
        place = f"tenants.{name}.keys[{number}]"
        if (key.key is None) == (key.key_sha256 is None):
            raise ValueError(f"{place}: give either key or key_sha256")
        if key.key is not None:
            if problem := key_problem(key.key):
                raise ValueError(f"{place}.key: {problem}")
            yield place, key_hash(key.key)
            continue
        digest = str(key.key_sha256).lower()
        if not HASH.fullmatch(digest):
            raise ValueError(f"{place}.key_sha256: a SHA-256 has 64 hex digits")
        yield place, digest


def _warn_of_permissions(path: str, mode: int, content: KeyFile) -> None:
    has_texts = any(key.key is not None for t in content.tenants.values() for key in t.keys)
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        logger.warning("api_keys %s: other users can change it: chmod 600 %s", path, path)
    elif has_texts and mode & (stat.S_IRGRP | stat.S_IROTH):
        logger.warning("api_keys %s: other users can read its keys: chmod 600 %s", path, path)
