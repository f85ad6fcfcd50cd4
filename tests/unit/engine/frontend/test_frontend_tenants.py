"""The tenant of a message: from the client's key, or from the operator who passes it on."""

from typing import Any

import pytest

from loraplex.engine.config import AdapterConfig, ServerConfig
from loraplex.engine.frontend import requests as frontend_requests
from loraplex.engine.frontend.inputs import TextCodec
from loraplex.engine.ipc.messages.frontend import (
    AdapterCommand,
    AdapterReply,
    ReplyRows,
    StatsQuery,
    StatsReply,
)
from loraplex.scheduler.frontend_protocol import AddRequest

from helpers.fakes.frontend_harness import A, B, FrontendHarness

COMMANDS = ("unload_adapter", "pin_adapter", "unpin_adapter", "list_adapters")


@pytest.fixture
def harness(codec: TextCodec) -> FrontendHarness:
    harness = FrontendHarness(codec)
    harness.keys[A] = "ann"
    return harness


@pytest.mark.parametrize("values", [{}, {"tenant": ""}, {"tenant": "ann"}])
def test_the_key_says_who_asks(harness: FrontendHarness, values: dict[str, Any]) -> None:
    harness.ask(A, **values)
    (added,) = harness.take_sent(AddRequest)
    assert (added.tenant, added.client) == ("ann", A)
    for kind in COMMANDS:
        harness.ask(A, kind, name="x", **values)
        (command,) = harness.take_sent(AdapterCommand)
        assert command.tenant == "ann"


@pytest.mark.parametrize("kind", ["generate", *COMMANDS, "load_adapter"])
def test_a_tenant_cannot_act_for_another(harness: FrontendHarness, kind: str) -> None:
    values = {} if kind == "generate" else {"name": "x"}
    values |= {"path": "/x"} if kind == "load_adapter" else {}
    harness.ask(A, kind, tenant="ben", **values)
    (error,) = harness.take()
    assert (error["request_id"], error["code"]) == ("r", "forbidden")
    assert "'ann'" in error["message"]
    assert "'ben'" in error["message"]
    assert not harness.sent


def test_the_operator_passes_a_tenant_on(harness: FrontendHarness) -> None:
    for tenant in ("ann", "ben", ""):
        harness.ask(B, request_id=f"for {tenant}", tenant=tenant)
        harness.ask(B, "unload_adapter", name="x", tenant=tenant)
        added, command = harness.sent
        assert (added.tenant, command.tenant) == (tenant, tenant)
        harness.sent.clear()
    assert not harness.take()


def test_loads_carry_the_tenant(codec: TextCodec, tmp_path: Any) -> None:
    harness = FrontendHarness(codec, adapter=AdapterConfig(adapter_root=str(tmp_path)))
    harness.keys[A] = "ann"
    harness.ask(A, "load_adapter", name="x", path=str(tmp_path))
    harness.run_pooled()
    (command,) = harness.take_sent(AdapterCommand)
    assert (command.op, command.tenant) == ("load", "ann")


def test_no_tenant_goes_before_others(harness: FrontendHarness) -> None:
    harness.ask(A, priority=-1)
    harness.ask(B, priority=-1, tenant="ben")
    for error in harness.take():
        assert error["code"] == "forbidden"
        assert "0 or more, got -1" in error["message"]
    assert not harness.sent
    harness.ask(A, priority=0)
    harness.ask(A, priority=7, request_id="later")
    harness.ask(B, priority=-9)
    assert [added.priority for added in harness.take_sent(AddRequest)] == [0, 7, -9]


def test_a_list_names_no_other_tenant(harness: FrontendHarness) -> None:
    """Nor where the files of others lie, or what is wrong with them."""
    details = {"path": "/secret", "error": "/secret/x is missing", "warnings": ["/secret/y"]}
    rows = [{"name": name, "owner": name, **details} for name in ("ann", "ben", "")]
    rows.append({"name": "well", "owner": "", "path": "/secret", "error": "", "warnings": []})
    seen = {}
    for client in (A, B):
        harness.ask(client, "list_adapters")
        (command,) = harness.take_sent(AdapterCommand)
        harness.frontend.on_scheduler(AdapterReply(command.command_id, adapters=rows))
        (reply,) = harness.take(client)
        seen[client] = [row["owner"] for row in reply["adapters"]]
        for row in reply["adapters"]:
            if client == B or row["owner"] == "ann":
                assert details.items() <= row.items() or row["name"] == "well"
            else:
                assert "/secret" not in str(row) and row["path"] is None
                assert bool(row["error"]) == (row["name"] != "well")
    assert seen == {A: ["ann", None, "", ""], B: ["ann", "ben", "", ""]}


@pytest.mark.parametrize("values", [{}, {"by_tier": True}])
def test_statistics_name_no_adapter_to_a_tenant(
    harness: FrontendHarness, values: dict[str, Any]
) -> None:
    key = "adapters_by_tier" if values else "resident_adapters"
    seen = {}
    for client in (A, B):
        harness.ask(client, "stats", **values)
        (query,) = harness.take_sent(StatsQuery)
        harness.frontend.on_scheduler(ReplyRows(query.query_id, [{"name": "@ben/secret"}]))
        harness.frontend.on_scheduler(StatsReply(query.query_id, {"running": 3}, []))
        (reply,) = harness.take(client)
        assert reply["stats"]["running"] == 3
        seen[client] = reply["stats"][key]
    assert seen == {A: [], B: [{"name": "@ben/secret"}]}


def test_a_private_engine_has_one_client_that_shares_with_nobody(codec: TextCodec) -> None:
    harness = FrontendHarness(codec, server=ServerConfig(endpoint=""))
    harness.ask(A)
    (added,) = harness.take_sent(AddRequest)
    assert (added.tenant, added.client) == ("", b"")


def test_the_connections_of_a_tenant_share_one_byte_budget(
    harness: FrontendHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.keys[b"second"] = "ann"
    monkeypatch.setattr(frontend_requests, "POOL_PROMPT_CHARS", 0)
    num_chars = frontend_requests.MAX_CLIENT_CHARS - 1
    harness.ask(A, prompt="x" * num_chars)
    harness.ask(b"second", prompt="x" * num_chars)
    (error,) = harness.take()
    assert error["code"] == "queue_full"
    harness.ask(B, prompt="x" * num_chars)
    assert not harness.take()
    harness.frontend.close()


def test_each_answer_of_a_request_counts_as_one(codec: TextCodec) -> None:
    harness = FrontendHarness(codec, server=ServerConfig(max_requests_per_client=5))

    def ask(request_id: str, n: int) -> list[str]:
        harness.ask(A, request_id=request_id, sampling_params={"n": n})
        return [reply["code"] for reply in harness.take(A)]

    assert ask("a", 3) == []
    assert ask("b", 3) == ["too_many_requests"]
    assert ask("c", 2) == []
    assert ask("d", 1) == ["too_many_requests"]
    for sequence in harness.take_sent(AddRequest):
        harness.output(sequence.request_id, [70], finish_reason="length")
    harness.take()
    assert ask("large", 9) == []  # alone, so that no request is refused for ever
    assert ask("more", 1) == ["too_many_requests"]
    harness.ask(A, "cancel", request_id="large")
    harness.take()
    assert ask("after", 5) == []


def test_the_scheduler_learns_which_sequences_are_one_request(harness: FrontendHarness) -> None:
    """It limits requests, and each of their answers."""
    harness.ask(A, sampling_params={"n": 3})
    harness.ask(A, request_id="single")
    sent = harness.take_sent(AddRequest)
    assert [(added.index, added.num_answers) for added in sent] == [(0, 3), (1, 3), (2, 3), (0, 1)]


def test_an_error_says_when_to_try_again(harness: FrontendHarness) -> None:
    for request_id, wait_s in (("limited", 12.5), ("failed", 0.0)):
        harness.ask(A, request_id=request_id)
        (added,) = harness.take_sent(AddRequest)
        error = {"error": "why", "error_code": "rate_limited", "retry_after_s": wait_s}
        harness.output(added.request_id, [], finish_reason="error", **error)
    limited, failed = harness.take(A)
    assert (limited["code"], limited["retry_after_s"]) == ("rate_limited", 12.5)
    assert "retry_after_s" not in failed


def test_a_client_whose_key_is_gone_only_sees_its_requests_end(harness: FrontendHarness) -> None:
    harness.ask(A)
    (added,) = harness.take_sent(AddRequest)
    harness.keys[A] = None
    harness.ask(A, request_id="another")
    for kind in COMMANDS:
        harness.ask(A, kind, name="x", request_id="another")
    for kind in ("stats", "reset_prefix_cache"):
        harness.ask(A, kind, request_id="another")
    replies = harness.take(A)
    assert [reply["code"] for reply in replies] == ["forbidden"] * (3 + len(COMMANDS))
    assert not harness.sent
    harness.ask(A, "health", request_id="h")
    harness.output(added.request_id, [70], finish_reason="length")
    health, output = harness.take(A)
    assert health["status"] == "ok" and output["finished"]
