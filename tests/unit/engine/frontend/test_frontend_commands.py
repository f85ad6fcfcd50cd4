from dataclasses import replace
from pathlib import Path

import pytest

from loraplex.engine.config import AdapterConfig, ServerConfig
from loraplex.engine.frontend.inputs import TextCodec
from loraplex.engine.ipc.messages.frontend import (
    AdapterCommand,
    AdapterReply,
    ReplyRows,
    StatsQuery,
    StatsReply,
)
from loraplex.engine.ipc.messages.pool_map import MAX_POOL_CELLS, PoolMap
from loraplex.memory.accounting.block_manager import Owner
from loraplex.scheduler.frontend_protocol import AddRequest
from loraplex.scheduler.worker_protocol import int_array

from helpers.fakes.frontend_harness import A, B, FrontendHarness


@pytest.fixture
def harness(codec: TextCodec) -> FrontendHarness:
    return FrontendHarness(codec)


def test_health_stats_and_ping(harness: FrontendHarness) -> None:
    harness.ask(A, "health")
    (health,) = harness.take()
    assert (health["type"], health["status"], health["max_model_len"]) == ("health", "ok", 64)
    assert (health["tokenizer"], health["chat_template"]) == (True, True)
    harness.frontend.on_message(A, {"type": "ping"})
    assert harness.take() == [{"type": "pong", "instance": health["instance"]}]
    harness.ask(A, "stats")
    (query,) = harness.take_sent(StatsQuery)
    harness.frontend.on_scheduler(StatsReply(query.query_id, {"running": 3}))
    (reply,) = harness.take()
    assert (reply["type"], reply["request_id"]) == ("stats", "r")
    assert reply["stats"]["running"] == 3
    assert reply["stats"]["frontend"]["received"] == 0


def test_the_prefix_cache_is_emptied_for_the_operator_alone(harness: FrontendHarness) -> None:
    harness.ask(A, "reset_prefix_cache")
    (query,) = harness.take_sent(StatsQuery)
    assert query.reset_prefix_cache
    harness.frontend.on_scheduler(StatsReply(query.query_id, {"pages_prefix": 0}))
    (reply,) = harness.take()
    assert (reply["type"], reply["stats"]["pages_prefix"]) == ("stats", 0)
    harness.ask(A, "stats")
    (query,) = harness.take_sent(StatsQuery)
    assert not query.reset_prefix_cache
    harness.keys[B] = "ben"
    harness.ask(B, "reset_prefix_cache")
    assert [error["code"] for error in harness.take(B)] == ["forbidden"]
    assert not harness.sent


def test_the_operator_alone_sees_the_pool(harness: FrontendHarness) -> None:
    harness.ask(A, "stats", pool_cells=5)
    (query,) = harness.take_sent(StatsQuery)
    assert query.pool_cells == 5
    owners = bytes([Owner.FREE, Owner.KV, Owner.ADAPTER, Owner.ADAPTER, Owner.PREFIX])
    pool = PoolMap(10, 2, owners, int_array([9, 9, 0, 4, 4]))
    harness.frontend.on_scheduler(StatsReply(query.query_id, {}, [pool]))
    (reply,) = harness.take()
    (shown,) = reply["stats"]["pools"]
    assert (shown["engine"], shown["num_pages"], shown["pages_per_cell"]) == ("", 10, 2)
    assert shown["runs"] == [0, 1, 1, 1, 3, 1, 7, 1, 2, 1]
    for wrong in (-1, MAX_POOL_CELLS + 1, True, "5"):
        harness.ask(A, "stats", pool_cells=wrong)
        assert [error["code"] for error in harness.take()] == ["bad_request"]
    harness.keys[B] = "ben"
    harness.ask(B, "stats", pool_cells=5)
    assert [error["code"] for error in harness.take(B)] == ["forbidden"]
    assert not harness.sent
    harness.ask(B, "stats")
    assert harness.take_sent(StatsQuery)


def test_adapter_commands(codec: TextCodec, tmp_path: Path) -> None:
    inside = tmp_path / "root" / "pirate"
    inside.mkdir(parents=True)
    harness = FrontendHarness(codec, adapter=AdapterConfig(adapter_root=str(tmp_path / "root")))
    for lazy, op in [(False, "load"), (True, "register")]:
        harness.ask(A, "load_adapter", name="pirate", path=str(inside), lazy=lazy)
        harness.run_pooled()
        (command,) = harness.take_sent(AdapterCommand)
        assert (command.op, command.name, command.source.path) == (op, "pirate", str(inside))
        harness.frontend.on_scheduler(
            AdapterReply(command.command_id, adapters=[{"name": "pirate"}])
        )
        (reply,) = harness.take()
        assert reply == {"type": "adapters", "request_id": "r", "adapters": [{"name": "pirate"}]}
    harness.ask(A, "unload_adapter", name="pirate")
    (command,) = harness.take_sent(AdapterCommand)
    assert command.op == "unload"
    harness.frontend.on_scheduler(AdapterReply(command.command_id, "unknown", "unknown_adapter"))
    assert harness.take()[0]["code"] == "unknown_adapter"
    for kind, op in [("pin_adapter", "pin"), ("unpin_adapter", "unpin"), ("list_adapters", "list")]:
        harness.ask(A, kind, name="pirate")
        (command,) = harness.take_sent(AdapterCommand)
        assert (command.op, command.name) == (op, "pirate")
    harness.ask(A, "list_adapters")
    (command,) = harness.take_sent(AdapterCommand)
    assert (command.op, command.name) == ("list", "")
    for kind in ("pin_adapter", "unpin_adapter"):
        harness.ask(A, kind)
        assert "needs 'name'" in harness.take()[-1]["message"]


def test_a_reply_in_parts_reaches_the_client_as_one(harness: FrontendHarness) -> None:
    harness.ask(A, "list_adapters")
    (listing,) = harness.take_sent(AdapterCommand)
    harness.ask(A, "stats", request_id="s")
    (query,) = harness.take_sent(StatsQuery)
    harness.frontend.on_scheduler(ReplyRows(listing.command_id, [{"name": "a"}, {"name": "b"}]))
    harness.frontend.on_scheduler(ReplyRows(query.query_id, [{"content_hash": "h"}]))
    harness.frontend.on_scheduler(ReplyRows(listing.command_id, [{"name": "c"}]))
    assert harness.take() == []
    harness.frontend.on_scheduler(StatsReply(query.query_id, {"running": 1}))
    harness.frontend.on_scheduler(AdapterReply(listing.command_id))
    stats, adapters = harness.take()
    assert stats["stats"]["running"] == 1
    assert stats["stats"]["resident_adapters"] == [{"content_hash": "h"}]
    assert [row["name"] for row in adapters["adapters"]] == ["a", "b", "c"]


def test_adapters_load_from_the_root_alone(codec: TextCodec, tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "link").symlink_to(outside)
    (tmp_path / "rootless").mkdir()
    harness = FrontendHarness(codec, adapter=AdapterConfig(adapter_root=str(root)))
    paths = ["/etc", str(outside), f"{root}/../outside", f"{root}/link", "../outside", "link",
             str(tmp_path / "rootless"), "a\0b"]  # fmt: skip
    for path in paths:
        harness.ask(A, "load_adapter", name="x", path=path)
        harness.run_pooled()
        (error,) = harness.take()
        assert error["code"] == "forbidden", path
    harness.ask(A, "load_adapter", name="x", path=str(root / "missing"))
    harness.run_pooled()
    assert harness.take()[0]["code"] == "adapter"
    assert not harness.sent
    no_root = FrontendHarness(codec)
    no_root.ask(A, "load_adapter", name="x", path=str(root))
    no_root.run_pooled()
    assert no_root.take()[0]["code"] == "forbidden"


@pytest.mark.parametrize("frames", [[], [b"", b""], [b"\x80", b"\x80"], [b"\xc1"], [b""]])
def test_odd_frames_get_one_error(harness: FrontendHarness, frames: list[bytes]) -> None:
    harness.frontend.on_frames(A, frames)
    (error,) = harness.take()
    assert error["code"] == "malformed"
    assert harness.stats["malformed"] == 1


def test_an_internal_fault_is_reported_without_details(harness: FrontendHarness) -> None:
    harness.scheduler_error = RuntimeError("secret path /etc/x")
    harness.ask(A)
    (error,) = harness.take()
    assert (error["code"], error["request_id"]) == ("internal", "r")
    assert "secret" not in error["message"]


def test_unanswered_queries_are_limited(harness: FrontendHarness) -> None:
    for i in range(1100):
        harness.ask(A, "stats", request_id=str(i))
    codes = [m["code"] for m in harness.take()]
    assert codes == ["queue_full"] * (1100 - 512)  # half of the places
    harness.ask(B, "stats")
    assert harness.take() == []


def test_without_a_tokenizer_ids_come_and_go() -> None:
    harness = FrontendHarness(None)
    harness.ask(A, prompt="hello")
    assert "skip_tokenizer_init" in harness.take()[0]["message"]
    harness.ask(A, prompt_token_ids=[5])
    (added,) = harness.take_sent(AddRequest)
    harness.output(added.request_id, [70], finish_reason="length")
    (reply,) = harness.take()
    assert (reply["outputs"][0]["text"], reply["outputs"][0]["token_ids"]) == ("", [70])


def test_default_server_is_private() -> None:
    assert replace(ServerConfig()).endpoint.startswith("tcp://127.0.0.1:")


def test_stats_have_the_adapters_by_tier_if_asked(harness: FrontendHarness) -> None:
    harness.ask(A, "stats", by_tier=True)
    (query,) = harness.take_sent(StatsQuery)
    assert query.by_tier
    row = {"name": "a", "tier": "host", "pinned": False}
    harness.frontend.on_scheduler(ReplyRows(query.query_id, [row]))
    harness.frontend.on_scheduler(StatsReply(query.query_id, {}))
    (reply,) = harness.take()
    assert reply["stats"]["adapters_by_tier"] == [row]
    assert "resident_adapters" not in reply["stats"]
