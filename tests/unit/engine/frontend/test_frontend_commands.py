from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loraplex.engine.config import AdapterConfig, ServerConfig
from loraplex.engine.frontend.inputs import TextCodec
from loraplex.engine.ipc.messages import (
    AdapterCommand,
    AdapterReply,
    AddRequest,
    StatsQuery,
    StatsReply,
)

from helpers.fakes.frontend_desk import A, Desk, make_codec


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    return make_codec(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def desk(codec: TextCodec) -> Desk:
    return Desk(codec)


def test_health_stats_and_ping(desk: Desk) -> None:
    desk.ask(A, "health")
    (health,) = desk.take()
    assert (health["type"], health["status"], health["max_model_len"]) == ("health", "ok", 64)
    assert (health["tokenizer"], health["chat_template"]) == (True, True)
    desk.frontend.on_message(A, {"type": "ping"})
    assert desk.take() == [{"type": "pong"}]
    desk.ask(A, "stats")
    (query,) = desk.take_sent(StatsQuery)
    desk.frontend.on_scheduler(StatsReply(query.query_id, {"running": 3}))
    (reply,) = desk.take()
    assert (reply["type"], reply["request_id"]) == ("stats", "r")
    assert reply["stats"]["running"] == 3
    assert reply["stats"]["frontend"]["received"] == 0


def test_adapter_commands(codec: TextCodec, tmp_path: Path) -> None:
    inside = tmp_path / "root" / "pirate"
    inside.mkdir(parents=True)
    desk = Desk(codec, adapter=AdapterConfig(adapter_root=str(tmp_path / "root")))
    for lazy, op in [(False, "load"), (True, "register")]:
        desk.ask(A, "load_adapter", name="pirate", path=str(inside), lazy=lazy)
        (command,) = desk.take_sent(AdapterCommand)
        assert (command.op, command.name, command.path) == (op, "pirate", str(inside))
        desk.frontend.on_scheduler(AdapterReply(command.command_id, adapters=[{"name": "pirate"}]))
        (reply,) = desk.take()
        assert reply == {"type": "adapters", "request_id": "r", "adapters": [{"name": "pirate"}]}
    desk.ask(A, "unload_adapter", name="pirate")
    (command,) = desk.take_sent(AdapterCommand)
    assert command.op == "unload"
    desk.frontend.on_scheduler(AdapterReply(command.command_id, "unknown", "unknown_adapter"))
    assert desk.take()[0]["code"] == "unknown_adapter"
    for kind, op in [("pin_adapter", "pin"), ("unpin_adapter", "unpin"), ("list_adapters", "list")]:
        desk.ask(A, kind, name="pirate")
        (command,) = desk.take_sent(AdapterCommand)
        assert (command.op, command.name) == (op, "pirate")
    desk.ask(A, "list_adapters")
    (command,) = desk.take_sent(AdapterCommand)
    assert (command.op, command.name) == ("list", "")
    for kind in ("pin_adapter", "unpin_adapter"):
        desk.ask(A, kind)
        assert "needs 'name'" in desk.take()[-1]["message"]


def test_adapters_load_from_the_root_alone(codec: TextCodec, tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "link").symlink_to(outside)
    (tmp_path / "rootless").mkdir()
    desk = Desk(codec, adapter=AdapterConfig(adapter_root=str(root)))
    paths = ["/etc", str(outside), f"{root}/../outside", f"{root}/link", "../outside", "link",
             str(tmp_path / "rootless"), "a\0b"]  # fmt: skip
    for path in paths:
        desk.ask(A, "load_adapter", name="x", path=path)
        (error,) = desk.take()
        assert error["code"] == "forbidden", path
    desk.ask(A, "load_adapter", name="x", path=str(root / "missing"))
    assert desk.take()[0]["code"] == "adapter"
    assert not desk.sent
    no_root = Desk(codec)
    no_root.ask(A, "load_adapter", name="x", path=str(root))
    assert no_root.take()[0]["code"] == "forbidden"


@pytest.mark.parametrize("frames", [[], [b"", b""], [b"\x80", b"\x80"], [b"\xc1"], [b""]])
def test_odd_frames_get_one_error(desk: Desk, frames: list[bytes]) -> None:
    desk.frontend.on_frames(A, frames)
    (error,) = desk.take()
    assert error["code"] == "malformed"
    assert desk.stats["malformed"] == 1


def test_a_fault_of_ours_is_told_without_details(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("secret path /etc/x")

    monkeypatch.setattr(desk.frontend._requests, "add", broken)
    desk.ask(A)
    (error,) = desk.take()
    assert (error["code"], error["request_id"]) == ("internal", "r")
    assert "secret" not in error["message"]


def test_unanswered_queries_are_limited(desk: Desk) -> None:
    for i in range(1100):
        desk.ask(A, "stats", request_id=str(i))
    codes = [m["code"] for m in desk.take()]
    assert codes == ["queue_full"] * (1100 - 1024)


def test_without_a_tokenizer_ids_come_and_go() -> None:
    desk = Desk(None)
    desk.ask(A, prompt="hello")
    assert "skip_tokenizer_init" in desk.take()[0]["message"]
    desk.ask(A, prompt_token_ids=[5])
    (added,) = desk.take_sent(AddRequest)
    desk.output(added.request_id, [70], finish_reason="length")
    (reply,) = desk.take()
    assert (reply["outputs"][0]["text"], reply["outputs"][0]["token_ids"]) == ("", [70])


def test_default_server_is_private() -> None:
    assert replace(ServerConfig()).endpoint.startswith("tcp://127.0.0.1:")
