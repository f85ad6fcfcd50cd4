"""The file of --api-keys: what it says, and what is refused by name."""

import hashlib
import json
import logging
from pathlib import Path

import pytest

from loraplex.engine.config import ServerConfig
from loraplex.engine.errors import ConfigError
from loraplex.engine.tenants.api_key import key_hash, new_key
from loraplex.engine.tenants.key_file import read_key_file, read_tenants_of
from loraplex.scheduler.tenants.tenant import Tenant

KEY = "a-key-of-more-than-20-characters"
HASH = hashlib.sha256(b"another").hexdigest()
GOOD = f"""
tenants:
  acme:
    weight: 2.5
    limits: {{requests_per_minute: 600, tokens_per_minute: 200000, max_running_requests: 32}}
    keys:
      - key: {KEY}
      - key_sha256: {HASH.upper()}
  curve only: {{limits: {{max_running_requests: 1}}}}
  admin:
    keys:
      - key_sha256: {"0" * 63}a
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    path.touch(mode=0o600)
    return path


def test_a_good_file(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.write_text(GOOD)
    table = read_key_file(str(file))
    assert table.tenants == [
        Tenant("acme", 2.5, 600, 200000, 32),
        Tenant("curve only", max_running_requests=1),
    ]
    own = hashlib.sha256(KEY.encode()).hexdigest()
    assert table.key_owners == {own: "acme", HASH: "acme", "0" * 63 + "a": ""}
    assert not caplog.records


def test_json_is_read_as_well(file: Path) -> None:
    file.write_text(json.dumps({"tenants": {"ann": {"keys": [{"key_sha256": HASH}]}}}))
    assert read_key_file(str(file)).key_owners == {HASH: "ann"}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "Expected `object`, got `null`"),
        ("tenants: [", "neither YAML nor JSON"),
        ("tenant: {}", "unknown field `tenant`"),
        ("tenants: {a: {key: x}}", "unknown field `key`"),
        ("tenants: {a: {limits: {requests_per_second: 1}}}", "unknown field `requests_per_second`"),
        ("tenants: {a: {limits: {requests_per_minute: 0}}}", ">= 1"),
        ("tenants: {a: {limits: {tokens_per_minute: 1.5}}}", "Expected `int"),
        ("tenants: {a: {weight: 0}}", "tenants.a.weight: a weight is a positive number"),
        ("tenants: {a: {weight: .inf}}", "a weight is a positive number"),
        ("tenants: {a: {}, a: {}}", "line 1: 'a' is there twice"),
        ("tenants: {a: {weight: 1, weight: 2}}", "'weight' is there twice"),
        ("tenants: {7: {}}", "Expected `str`"),
        ('tenants: {"": {}}', "printable"),
        ("tenants: {a: {keys: [{}]}}", "tenants.a.keys[0]: give either key or key_sha256"),
        (f"tenants: {{a: {{keys: [{{key: {KEY}, key_sha256: x}}]}}}}", "give either"),
        ("tenants: {a: {keys: [{key: short}]}}", "tenants.a.keys[0].key: a key has 20 to 512"),
        ("tenants: {a: {keys: [{key: 'a key with spaces in its text'}]}}", "without spaces"),
        ("tenants: {a: {keys: [{key_sha256: abc}]}}", "64 hex digits"),
        (
            f"tenants: {{a: {{keys: [{{key: {KEY}}}]}}, b: {{keys: [{{key: {KEY}}}]}}}}",
            "tenants.b.keys[0]: tenant 'a' has this key already",
        ),
        ("tenants: {admin: {weight: 2}}", "the operator, who has no weight"),
        ("tenants: {admin: {limits: {max_running_requests: 1}}}", "the operator"),
        ("tenants: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_a_bad_file_is_refused_by_name(file: Path, text: str, error: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as refusal:
        read_key_file(str(file))
    assert error in str(refusal.value) and str(file) in str(refusal.value)
    assert KEY not in str(refusal.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: .*No such file"):
        read_key_file(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("mode", "text", "warning"),
    [
        (0o600, GOOD, ""),
        (0o640, GOOD, "other users can read its keys"),
        (0o644, f"tenants: {{a: {{keys: [{{key_sha256: {HASH}}}]}}}}", ""),
        (0o660, "tenants: {}", "other users can change it"),
    ],
)
def test_weak_permissions_are_warned_of(
    file: Path, caplog: pytest.LogCaptureFixture, mode: int, text: str, warning: str
) -> None:
    file.write_text(text)
    file.chmod(mode)
    with caplog.at_level(logging.WARNING):
        read_key_file(str(file))
    assert [warning in record.getMessage() for record in caplog.records] == [True] * bool(warning)


def test_no_server_is_open_beside_its_keys(file: Path) -> None:
    """A client of an endpoint without CurveZMQ keys would be the operator."""
    file.write_text("tenants: {}")
    keys = str(file)
    for config in (
        ServerConfig(endpoint="", api_keys=keys),
        ServerConfig(endpoint="ipc:///run/x", api_keys=keys),
        ServerConfig(api_keys=keys, client_public_keys_dir="clients"),
        ServerConfig(api_keys=keys, insecure=True),
    ):
        assert read_tenants_of(config).key_owners == {}
    with pytest.raises(ConfigError, match="clients need no key at endpoint tcp://"):
        read_tenants_of(ServerConfig(api_keys=keys))
    assert read_tenants_of(ServerConfig()).key_owners is None


def test_keys_are_random_and_good(file: Path) -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    key = keys.pop()
    file.write_text(f"tenants: {{a: {{keys: [{{key: {key}}}]}}}}")
    assert read_key_file(str(file)).key_owners == {key_hash(key): "a"}
