"""Several adapters in a client's message, and mixes that the configuration names."""

from array import array
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from loraplex.engine.config import AdapterConfig
from loraplex.engine.errors import ClientError, ConfigError
from loraplex.engine.frontend import protocol
from loraplex.engine.frontend.inputs import TextCodec
from loraplex.engine.frontend.mixing.named_mixes import check_adapter_config, named_mixes
from loraplex.scheduler.frontend_protocol import AddRequest, MixPart

from helpers.fakes.frontend_harness import A, FrontendHarness

NUMBERS = count()
GENERATE = {"type": "generate", "request_id": "r", "prompt_token_ids": [1, 2]}


@pytest.mark.parametrize(
    ("adapters", "text"),
    [
        ([], "1 to 8 adapters, got 0"),
        ([{"name": f"a{i}"} for i in range(9)], "1 to 8 adapters, got 9"),
        ([{"name": "a"}, {"name": "b"}, {"name": "a", "weight": 2}], "names 'a' twice"),
        ([{"weight": 0.5}], "needs a name"),
        ([{"name": "../a"}], "not an adapter name"),
        ([{"name": "a", "scale": 2}], "not 'scale'"),
        ([{"name": "a", "weight": 0}], "finite in float32 and not 0"),
        ([{"name": "a", "weight": float("nan")}], "finite"),
        ([{"name": "a", "weight": 1e300}], "finite"),
        ([{"name": "a", "weight": 1e-300}], "not 0"),
        ([{"name": "a", "weight": "0.5"}], "must be a number"),
        ([{"name": "a", "weight": True}], "must be a number"),
        ("a:0.5", "list of maps"),
        (["a"], "list of maps"),
    ],
)
def test_bad_lists_are_refused(adapters: Any, text: str) -> None:
    with pytest.raises(ClientError, match=text) as caught:
        protocol.parse({**GENERATE, "adapters": adapters})
    assert caught.value.code == "bad_request" and "adapters" in str(caught.value)


def test_adapter_and_adapters_exclude_each_other() -> None:
    with pytest.raises(ClientError, match="adapter or adapters, not both"):
        protocol.parse({**GENERATE, "adapter": "a", "adapters": [{"name": "b"}]})


def ask(harness: FrontendHarness, **values: Any) -> AddRequest:
    harness.ask(A, request_id=f"r{next(NUMBERS)}", prompt_token_ids=[1, 2], **values)
    sent = harness.take_sent(AddRequest)
    while not sent:  # a turn for each folder
        harness.run_pooled()
        sent = harness.take_sent(AddRequest)
    (request,) = sent
    assert request.prompt_token_ids == array("i", [1, 2])
    return request


def test_what_the_scheduler_gets(codec: TextCodec, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    harness = FrontendHarness(codec, adapter=AdapterConfig(adapter_root=str(tmp_path)))
    mix = [{"name": "b", "weight": -0.5}, {"name": "a"}]
    request = ask(harness, adapters=mix)
    assert request.adapter == "a+b"
    assert request.mix == [MixPart("b", -0.5), MixPart("a", 1.0)] == request.parts
    alone = ask(harness, adapters=[{"name": "a"}])
    assert (alone.adapter, alone.mix) == ("a", [])
    assert alone.parts == [MixPart("a")]
    weak = ask(harness, adapters=[{"name": "a", "weight": 0.1}])
    (part,) = weak.mix
    assert part.weight == pytest.approx(0.1, rel=1e-6) and weak.adapter == "a"
    folders = [
        {"name": "a", "path": str(tmp_path / "one"), "load_inplace": True},
        {"name": "b", "path": str(tmp_path / "two"), "weight": 2.0},
    ]
    first, second = ask(harness, adapters=folders).mix
    assert first.source is not None and first.source.path == str(tmp_path / "one")
    assert first.load_inplace and not second.load_inplace
    assert second.source is not None and second.source.path == str(tmp_path / "two")


def test_one_bad_folder_fails_the_request_by_its_adapters_name(
    codec: TextCodec, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    harness = FrontendHarness(codec, adapter=AdapterConfig(adapter_root=str(tmp_path)))
    paths = {"a": tmp_path / "one", "b": "/etc", "c": tmp_path / "missing"}
    adapters = [{"name": name, "path": str(path)} for name, path in paths.items()]
    harness.ask(A, prompt_token_ids=[1], adapters=adapters)
    replies: list[dict[str, Any]] = []
    while not replies:
        harness.run_pooled()
        replies = harness.take()
    (reply,) = replies
    assert reply["type"] == "error" and reply["code"] in ("forbidden", "adapter")
    assert "adapter 'b'" in reply["message"] or "adapter 'c'" in reply["message"]
    assert not harness.take_sent(AddRequest)


def config_of(*mixes: tuple[str, str], **values: Any) -> AdapterConfig:
    return AdapterConfig(adapter_mixes=mixes, **values)


def test_named_mixes(codec: TextCodec) -> None:
    mixes = config_of(("both", "a:0.75, b:-2"), ("v", "hub/x:1,y"), ("only", "a"))
    harness = FrontendHarness(codec, adapter=mixes)
    request = ask(harness, adapter="both")
    assert request.adapter == "both"
    assert request.mix == [MixPart("a", 0.75), MixPart("b", -2.0)]
    assert [part.adapter for part in ask(harness, adapter="v").mix] == ["hub/x", "y"]
    assert ask(harness, adapter="only").adapter == "a"
    assert ask(harness, adapter="other").parts == [MixPart("other")]
    harness.ask(A, prompt_token_ids=[1], adapter="both", adapter_path="/x")
    assert "is a mix" in harness.take()[0]["message"]
    harness.ask(A, "load_adapter", name="both", path="/x")
    assert "under another name" in harness.take()[0]["message"]


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (config_of(("m", "a:0")), "not 0"),
        (config_of(("m", "a,a:2")), "twice"),
        (config_of(("m", "")), "not an adapter name"),
        (config_of(("m/", "a"), ("m/", "b")), "name of an adapter or another mix"),
        (config_of((" m", "a")), "is no name"),
    ],
)
def test_bad_mixes_are_found_at_start(config: AdapterConfig, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        named_mixes(config)


def test_a_mix_has_no_adapters_name(tmp_path: Path) -> None:
    (tmp_path / "legal").mkdir()
    (tmp_path / "legal" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="'legal' has the name"):
        check_adapter_config(config_of(("legal", "a"), adapter_dir=str(tmp_path)))
