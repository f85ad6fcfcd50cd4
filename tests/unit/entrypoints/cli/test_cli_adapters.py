"""`loraplex adapters` against the whole engine in one thread, with a fake worker."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loraplex.engine.config import AdapterConfig
from loraplex.engine.processes.in_process import InProcessEngine
from loraplex.entrypoints.cli import adapters as cli_adapters
from loraplex.entrypoints.cli import main as cli
from loraplex.entrypoints.client import sync_client as client_module
from loraplex.entrypoints.client.sync_client import Client

from helpers.fakes.fake_engine import FakeEngineWorker, fake_config, make_fake_adapter


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    for name in ("a", "b"):
        make_fake_adapter(tmp_path / name, f"content of {name}")
    engine = InProcessEngine(
        fake_config(adapter=AdapterConfig(adapter_root=str(tmp_path))), worker=FakeEngineWorker
    )
    with Client(engine) as client:

        @contextmanager
        def connect(endpoint: str, **options: Any) -> Iterator[Client]:
            assert (endpoint, options["timeout_s"]) == ("ipc://there", 9.0)
            yield client

        monkeypatch.setattr(client_module, "Client", connect)
        monkeypatch.chdir(tmp_path)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("there")
            server.listen()
            yield client


def adapters(*arguments: str) -> int:
    return cli.main(["adapters", *arguments, "--endpoint", "ipc://there", "--timeout-s", "9"])


@pytest.mark.parametrize("endpoint", ["ipc:///nowhere/at/all", "tcp://127.0.0.1:1"])
def test_no_server_is_an_error_at_once(
    endpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(client_module, "Client", None)  # it would wait for --timeout-s
    assert cli.main(["adapters", "list", "--endpoint", endpoint]) == 1
    error = capsys.readouterr().err
    assert f"no server answers at {endpoint}" in error
    assert "start one with `loraplex serve`" in error


def said(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_load_list_pin_unload(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    assert adapters("list") == 0
    assert said(capsys) == [list(cli_adapters.HEADER)]
    assert adapters("list", "--json") == 0
    assert capsys.readouterr().out == ""
    assert adapters("load", "a=a", "x=b") == 0
    header, *rows = said(capsys)
    assert header == list(cli_adapters.HEADER)
    assert [row[:2] for row in rows] == [["a", "ready"], ["x", "ready"]]
    assert rows[0][-1] == "never"
    assert adapters("pin", "x") == 0
    assert said(capsys)[1][3] == "yes"
    assert adapters("list", "--json") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(f["name"], f["pinned"]) for f in found] == [("a", False), ("x", True)]
    assert adapters("unpin", "x") == 0 and adapters("unload", "x", "a") == 0
    assert said(capsys)[-2:] == [["unloaded", "x"], ["unloaded", "a"]]
    assert client.list_adapters() == []


def test_lazy_and_what_fails_later(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    assert adapters("load", "--lazy", "late=a") == 0
    assert said(capsys)[1][:3] == ["late", "registered", "disk"]
    row = client.list_adapters("late")[0] | {"state": "failed", "error": "no such thing"}
    assert cli_adapters.table([row])[1].endswith("\n  no such thing")
    activated = cli_adapters.table([row | {"kind": "lora", "invocation_tokens": [7]}])
    assert "lora, activated" in activated[1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["list", "unknown"], "unknown"),
        (["unload", "unknown"], "unknown"),
        (["load", "a=../elsewhere"], "adapter_root"),
    ],
)
def test_failures(
    client: Client,
    arguments: list[str],
    text: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert adapters(*arguments) == 1
    captured = capsys.readouterr()
    assert text in captured.err and not captured.out
    assert client.list_adapters() == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "ACTION"),
        (["unknown"], "invalid choice: 'unknown'"),
        (["pin"], "required: NAME"),
        (["load", "a"], "'a' should read NAME=VALUE"),
        (["load", "a=a", "b="], "'b=' should read NAME=VALUE"),
    ],
)
def test_wrong_usage(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        adapters(*arguments)
    assert exit_.value.code == 2 and text in capsys.readouterr().err


def test_an_endpoint_without_a_server(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/none"
    assert cli.main(["adapters", "list", "--endpoint", endpoint, "--timeout-s", "0.2"]) == 1
    assert endpoint in capsys.readouterr().err
