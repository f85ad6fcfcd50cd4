"""Who may change the adapter of a name, and how many names a tenant may have."""

from collections.abc import Callable

import pytest

from loraplex.scheduler.frontend_protocol import AdapterSource
from loraplex.scheduler.request import RequestRefused
from loraplex.scheduler.scheduler import Scheduler

from helpers.scheduling.scheduler_harness import Harness

Command = Callable[[Scheduler, str], object]
MINE, OTHER = AdapterSource.at("/mine"), AdapterSource.at("/other")

COMMANDS: dict[str, Command] = {
    "register": lambda scheduler, tenant: scheduler.register_adapter("x", OTHER, tenant),
    "load": lambda scheduler, tenant: scheduler.load_adapter("x", OTHER, "load", tenant),
    "pin": lambda scheduler, tenant: scheduler.pin_adapter("x", "pin", tenant),
    "unpin": lambda scheduler, tenant: scheduler.unpin_adapter("x", tenant),
    "unload": lambda scheduler, tenant: scheduler.unload_adapter("x", tenant),
}


def harness_with_x(owner: str, max_names: int = 16) -> Harness:
    harness = Harness(policy={"max_adapters_per_tenant": max_names})
    for path in (MINE.path, OTHER.path):
        harness.file(path, path)
    harness.scheduler.register_adapter("x", MINE, owner)
    return harness


def listed(harness: Harness) -> dict[str, tuple[str, str]]:
    """Returns path and owner of each name."""
    return {name: (row["path"], row["owner"]) for name, row in harness.listed().items()}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("owner", ["ann", ""])
def test_another_tenant_changes_nothing(command: str, owner: str) -> None:
    harness = harness_with_x(owner)
    before = harness.listed()
    with pytest.raises(RequestRefused, match=r"tenant 'ben' may not \w+ adapter 'x'") as refusal:
        COMMANDS[command](harness.scheduler, "ben")
    assert refusal.value.code == "forbidden"
    assert harness.listed() == before
    assert harness.scheduler.take_commands() == []
    harness.verify()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("tenant", ["ann", ""])
def test_owner_and_operator_may(command: str, tenant: str) -> None:
    harness = harness_with_x("ann")
    COMMANDS[command](harness.scheduler, tenant)
    harness.settle()
    expected = {
        "register": {"x": ("/other", "ann")},
        "load": {"x": ("/other", "ann")},
        "unload": {},
    }
    assert listed(harness) == expected.get(command, {"x": ("/mine", "ann")})


def test_the_owner_stays_when_the_files_change_or_fail() -> None:
    harness = harness_with_x("ann")
    for stamp in ("1", "2"):
        harness.file("/mine", f"content {stamp}")
        source = AdapterSource("/mine", "/mine", stamp)
        harness.scheduler.load_adapter("x", source, stamp, "ben")  # the same folder
        harness.settle()
        assert listed(harness) == {"x": ("/mine", "ann")}
    harness.worker.max_host = 0
    harness.file("/mine", "", error="broken")
    harness.add("r", [1], adapter="x", max_tokens=1, tenant="ben")
    harness.run()
    assert listed(harness) == {"x": ("/mine", "ann")}
    with pytest.raises(RequestRefused, match="may not unload"):
        harness.scheduler.unload_adapter("x", "ben")


def test_any_tenant_may_use_any_adapter_by_name() -> None:
    harness = harness_with_x("ann")
    for tenant in ("ann", "ben", ""):
        harness.add(tenant or "operator", [1], adapter="x", max_tokens=2, tenant=tenant)
    harness.run()


def test_a_name_that_is_free_again_gets_a_new_owner() -> None:
    harness = harness_with_x("ann")
    harness.scheduler.unload_adapter("x", "ann")
    harness.scheduler.register_adapter("x", OTHER, "ben")
    assert listed(harness) == {"x": ("/other", "ben")}
    with pytest.raises(RequestRefused, match="'ann' may not replace"):
        harness.scheduler.register_adapter("x", MINE, "ann")


def test_the_names_of_a_tenant_are_bounded() -> None:
    harness = harness_with_x("ann", max_names=3)
    register = harness.scheduler.register_adapter
    for name in ("y", "z"):
        register(name, MINE, "ann")
    for command in (register, lambda *args: harness.scheduler.load_adapter(*args[:2], 0, args[2])):
        with pytest.raises(RequestRefused, match="has registered 3 adapters") as refusal:
            command("one more", MINE, "ann")
        assert refusal.value.code == "too_many_adapters"
    register("x", OTHER, "ann")  # a name that it has
    for number in range(9):
        register(f"operator's {number}", MINE, "")
    register("ben's", MINE, "ben")
    harness.scheduler.unload_adapter("y", "")
    register("one more", MINE, "ann")
    harness.verify()


@pytest.mark.parametrize(("tenant", "sees"), [("ben", False), ("ann", True), ("", True)])
def test_errors_tell_other_tenants_no_path(tenant: str, sees: bool) -> None:
    """Neither that of a failed read, nor that of a failed adapter, nor that of a taken name."""
    harness = harness_with_x("ann")
    harness.files["/mine"].error = "/mine/adapter_config.json is damaged"
    harness.add("first", [1], adapter="x", tenant=tenant)
    harness.settle()
    harness.plan()
    texts = [harness.error_of("first")[1]]
    for source in (None, OTHER):
        with pytest.raises(RequestRefused) as refusal:
            harness.scheduler.adapters.registry.resolve("x", source, tenant)
        texts.append(refusal.value.text)
    for text in texts:
        assert text.startswith("adapter 'x' ")
        assert ("/mine" in text) == sees
    assert ("damaged" in texts[0], "damaged" in texts[1]) == (sees, sees)
    assert ("its owner and the operator" in texts[0]) != sees
