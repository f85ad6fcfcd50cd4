"""CurveZMQ keys that come and go while the server runs, and the limits of their tenants."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq.auth

from loraplex import Client, SamplingParams
from loraplex.engine.config import ServerConfig
from loraplex.engine.errors import ClientError, ConfigError
from loraplex.engine.processes.engine import Engine
from loraplex.entrypoints.client.outputs import RequestOutput
from loraplex.entrypoints.client.transport import SocketTransport

from helpers.fakes.fake_engine import expected_tokens, fake_config
from helpers.running.key_files import write_keys
from helpers.running.processes import GUARD_S, running_engine, wait_until

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of the server, of clients in "clients", of more clients in "others"."""
    path = tmp_path_factory.mktemp("client-keys")
    zmq.auth.create_certificates(path, "server")
    for place, name in (("clients", "ann"), ("clients", "ben"), ("others", "cid")):
        (path / place).mkdir(exist_ok=True)
        zmq.auth.create_certificates(path / place, name)
    write_keys(path / "keys.yaml", ann={"keys": []})
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    server = ServerConfig(
        endpoint="tcp://127.0.0.1:0",
        server_secret_key_file=str(folder / "server.key_secret"),
        client_public_keys_dir=str(folder / "clients"),
        api_keys=str(folder / "keys.yaml"),
        num_frontends=2,
    )
    with running_engine(fake_config(server=server), "--delay", "0.01") as engine:
        yield engine


def keys_of(folder: Path, place: str, name: str) -> dict[str, str]:
    return {
        "server_public_key": str(folder / "server.key"),
        "client_secret_key_file": str(folder / place / f"{name}.key_secret"),
    }


def test_limits_hold_over_zeromq(engine: Engine, folder: Path) -> None:
    limits = {"requests_per_minute": 2, "max_running_requests": 1}
    write_keys(folder / "keys.yaml", ann={"keys": [], "limits": limits})
    engine.reload_keys()
    transport = SocketTransport(engine.endpoint, **keys_of(folder, "clients", "ann"))
    replies: dict[str, dict[str, Any]] = {}

    def ask(request_id: str, kind: str = "generate", **values: Any) -> None:
        transport.send({"type": kind, "request_id": request_id, **values})

    def reply_to(request_id: str) -> dict[str, Any]:
        while request_id not in replies:
            replies.update({reply["request_id"]: reply for reply in transport.receive(GUARD_S)})
        return replies[request_id]

    request: dict[str, Any] = {"prompt_token_ids": [1], "stream": False}
    request["sampling_params"] = {"max_tokens": 400, "ignore_eos": True}
    try:
        for request_id in ("first", "second"):
            ask(request_id, **request)
        refused = reply_to("second")
        assert (refused["code"], refused["retry_after_s"]) == ("too_many_requests", 1.0)
        ask("first", "cancel")
        assert reply_to("first")["finished"]
        ask("third", **request)
        ask("third", "cancel")
        ask("fourth", **request)
        refused = reply_to("fourth")
        assert refused["code"] == "rate_limited" and 0 < refused["retry_after_s"] <= 30
        assert "tenant 'ann' has used up its 2 requests a minute" in refused["message"]
        assert reply_to("third")["finished"]
    finally:
        transport.close()


def test_keys_come_and_go(engine: Engine, folder: Path) -> None:
    long, two = SamplingParams(max_tokens=400), SamplingParams(max_tokens=2)
    clients, others = folder / "clients", folder / "others"
    with Client(engine.endpoint, timeout_s=GUARD_S, **keys_of(folder, "clients", "ben")) as ben:
        ben.submit([7], long)
        assert ben.health()["status"] == "ok"  # so the server has the request
        shutil.copy(others / "cid.key", clients)
        (clients / "ben.key").rename(others / "ben.key")
        engine.reload_keys()

        def is_refused() -> bool:
            try:
                ben.list_adapters()
            except ClientError as error:
                assert error.code == "forbidden" and "not known any more" in str(error)
                return True
            return False

        wait_until(is_refused)
        (output,) = ben.poll(GUARD_S)
        assert isinstance(output, RequestOutput)
        assert list(output.outputs[0].token_ids) == expected_tokens([7], max_tokens=400)
    with Client(engine.endpoint, timeout_s=GUARD_S, **keys_of(folder, "others", "cid")) as cid:
        *_, last = cid.generate([8], two)
        assert list(last.outputs[0].token_ids) == expected_tokens([8], max_tokens=2)
    (clients / "copy.key").write_bytes((clients / "cid.key").read_bytes())
    with pytest.raises(ConfigError, match="holds the key of another file"):
        engine.reload_keys()
    (clients / "copy.key").unlink()
