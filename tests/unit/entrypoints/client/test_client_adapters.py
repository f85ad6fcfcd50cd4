"""Adapters through a client and the whole engine in one thread, with a fake worker."""

from pathlib import Path

import pytest

from loraplex.engine.config import AdapterConfig
from loraplex.engine.errors import (
    AdapterError,
    ClientError,
    ConfigError,
    UnknownAdapterError,
)
from loraplex.entrypoints.client.lora_request import LoRARequest

from helpers.fakes.fake_engine import expected_tokens
from helpers.fakes.in_process_client import TEN, InProcessClient, last


def test_adapters_by_name_and_by_request(client: InProcessClient, tmp_path: Path) -> None:
    listed = client.load_adapter("one", str(tmp_path / "a"))
    assert listed["name"] == "one"
    by_name = last(client.generate([1, 2], TEN, adapter="one"))
    assert by_name.outputs[0].token_ids == expected_tokens([1, 2], "content of a", max_tokens=10)
    request = LoRARequest("two", 7, str(tmp_path / "b"))
    by_request = last(client.generate([1, 2], TEN, adapter=request))
    assert by_request.outputs[0].token_ids == expected_tokens([1, 2], "content of b", max_tokens=10)
    assert by_request.lora_request is request
    assert by_request.outputs[0].lora_request is request
    assert sorted(a["name"] for a in client.list_adapters()) == ["one", "two"]
    client.unload_adapter("one")
    with pytest.raises(UnknownAdapterError, match="'one'.*known: two"):
        last(client.generate([1], TEN, adapter="one"))
    with pytest.raises(UnknownAdapterError):
        client.unload_adapter("one")


def test_bad_adapters_are_errors_and_never_the_base_model(
    client: InProcessClient, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match="adapter_config.json"):
        client.load_adapter("x", str(tmp_path / "empty"))
    with pytest.raises(AdapterError):
        last(client.generate([1], TEN, adapter=LoRARequest("y", 1, str(tmp_path / "empty"))))
    with pytest.raises(ClientError) as caught:
        client.load_adapter("x", "/etc")
    assert caught.value.code == "forbidden"
    with pytest.raises(UnknownAdapterError):
        last(client.generate([1], TEN, adapter="nobody"))


def test_start_errors_are_the_engines_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing is no directory"):
        InProcessClient(adapter=AdapterConfig(adapters=(("x", str(tmp_path / "missing")),)))


def test_pins_tiers_and_service(client: InProcessClient, tmp_path: Path) -> None:
    client.load_adapter("one", str(tmp_path / "a"))
    assert client.list_adapters("one")[0]["tier"] == "host"
    assert client.pin_adapter("one")["pinned"]
    last(client.generate([1, 2, 3], TEN, adapter="one"))
    (listed,) = client.list_adapters("one")
    assert (listed["tier"], listed["pinned"], listed["num_requests"]) == ("pages", True, 0)
    service = listed["usage"]
    assert (service["num_prompt_tokens"], service["num_generated_tokens"]) == (3, 10)
    assert sum(service["hits"].values()) == 1 and service["ttft_p99_ms"] > 0
    assert not client.unpin_adapter("one")["pinned"]
    stats = client.stats()
    assert stats["adapter_usage"]["num_requests"] == 1
    assert (stats["pinned_adapters"], stats["pages_pinned"]) == (0, 0)
    for command in (client.pin_adapter, client.unpin_adapter, client.list_adapters):
        with pytest.raises(UnknownAdapterError, match="'nobody'"):
            command("nobody")
    client.unload_adapter("one")
    assert client.stats()["host_adapters"] == 0
