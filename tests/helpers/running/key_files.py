"""Files of API keys for tests."""

from pathlib import Path
from typing import Any

import yaml


def key_of(name: str) -> str:
    """Returns the key that a test gives to a name."""
    return f"lpx-{name}-{'0' * 20}"


def write_keys(path: Path, **tenants: dict[str, Any]) -> Path:
    """Writes a file with a key for each tenant, named as it, unless its `keys` name others."""
    entries = {
        name: {**entry, "keys": [{"key": key_of(key)} for key in entry.get("keys", [name])]}
        for name, entry in tenants.items()
    }
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump({"tenants": entries}))
    return path


def bearer(name: str) -> dict[str, str]:
    """Returns the header that shows a name's key."""
    return {"Authorization": f"Bearer {key_of(name)}"}
