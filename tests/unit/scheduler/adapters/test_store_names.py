"""Names that stores have, beside names that are registered."""

import pytest

from loraplex.scheduler.adapters.registry import AdapterRegistry
from loraplex.scheduler.adapters.store_names import private_name
from loraplex.scheduler.frontend_protocol import AdapterSource
from loraplex.scheduler.request import RequestRefused

from helpers.scheduling.scheduler_harness import Harness


def stored(path: str, stamp: str = "1", owner: str = "") -> AdapterSource:
    return AdapterSource(f"s3://{path}", f"/cache/{path}", stamp, is_from_store=True, owner=owner)


@pytest.fixture
def harness() -> Harness:
    return Harness(policy={"max_adapters_per_tenant": 2})


@pytest.fixture
def registry(harness: Harness) -> AdapterRegistry:
    return harness.scheduler.adapters.registry


def test_what_the_operator_or_the_tenant_registered_goes_first(
    harness: Harness, registry: AdapterRegistry
) -> None:
    harness.scheduler.register_adapter("x", AdapterSource.at("/x"))
    harness.scheduler.register_adapter("y", AdapterSource.at("/y"), "ann")
    for tenant in ("", "ann", "ben"):
        assert registry.resolve("x", stored("x"), tenant).path == "/x"
    assert registry.resolve("y", stored("y"), "ann").path == "/y"
    assert registry.resolve("y", stored("y"), "ben").path == "/cache/y"
    assert registry.resolve("y", stored("y"), "").path == "/cache/y"
    assert registry.resolve("y", None, "ann").path == "/y"
    assert registry.resolve("y", None, "ben").path == "/cache/y"
    harness.verify()


def test_private_adapters_are_their_tenants_alone(
    harness: Harness, registry: AdapterRegistry
) -> None:
    for tenant in ("ann", "ben"):
        registry.resolve("x", stored(f"{tenant}/x", owner=tenant), tenant)
    assert registry.resolve("x", None, "ann").path == "/cache/ann/x"
    assert registry.resolve("x", None, "ben").path == "/cache/ben/x"
    for tenant in ("eve", ""):
        with pytest.raises(RequestRefused, match="known: none") as refusal:
            registry.resolve("x", None, tenant)
        assert refusal.value.code == "unknown_adapter"
    harness.scheduler.unload_adapter("x", "ann")
    with pytest.raises(RequestRefused):
        registry.resolve("x", None, "ann")
    assert registry.resolve("x", None, "ben").path == "/cache/ben/x"
    harness.verify()


def test_private_names_do_not_meet(registry: AdapterRegistry) -> None:
    names = {private_name(t, n) for t, n in (("a", "b/c"), ("a/b", "c"), ("a%2Fb", "c"))}
    assert len(names) == 3


def test_new_files_in_a_store_make_a_new_version(registry: AdapterRegistry) -> None:
    old = registry.resolve("x", stored("x"))
    registry.bind(old, 0.0)
    assert registry.resolve("x", stored("x")) is old
    new = registry.resolve("x", stored("x", "2"))
    assert new is not old
    other = registry.resolve("x", stored("other/x"))  # an earlier store has the name now
    assert registry.current("x") is other


def test_private_names_count_for_their_tenant(harness: Harness, registry: AdapterRegistry) -> None:
    for name in ("x", "y"):
        registry.resolve(name, stored(f"ann/{name}", owner="ann"), "ann")
    with pytest.raises(RequestRefused) as refusal:
        registry.resolve("z", stored("ann/z", owner="ann"), "ann")
    assert refusal.value.code == "too_many_adapters"
    for number in range(5):
        registry.resolve(f"shared{number}", stored(f"shared{number}"), "ann")
    harness.verify()
