"""Two tenants with CURVE keys and the operator, at one server of real processes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq.auth

from loraplex import Client, SamplingParams
from loraplex.engine.config import AdapterConfig, ServerConfig
from loraplex.engine.errors import ClientError, QueueFullError
from loraplex.engine.processes.engine import Engine
from loraplex.entrypoints.client.outputs import RequestFailure, RequestOutput
from loraplex.entrypoints.client.transport import SocketTransport
from loraplex.scheduler.config import SchedulerConfig

from helpers.fakes.fake_engine import expected_tokens, fake_config, make_fake_adapter
from helpers.running.processes import GUARD_S, running_engine

PROMPT = list(range(5, 69))  # four blocks
TWO = SamplingParams(max_tokens=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of the server, of clients in "clients", and two adapters in "adapters"."""
    path = tmp_path_factory.mktemp("tenants")
    (path / "clients").mkdir()
    zmq.auth.create_certificates(path, "server")
    for name in ("ann", "ben", "admin"):
        zmq.auth.create_certificates(path / "clients", name)
    for name in ("red", "blue"):
        make_fake_adapter(path / "adapters" / name, name)
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    server = ServerConfig(
        endpoint="tcp://127.0.0.1:0",
        server_secret_key_file=str(folder / "server.key_secret"),
        client_public_keys_dir=str(folder / "clients"),
    )
    scheduler = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=512, max_queue_len=10)
    adapter = AdapterConfig(adapter_root=str(folder / "adapters"))
    config = fake_config(server=server, scheduler=scheduler, adapter=adapter)
    with running_engine(config, "--delay", "0.005") as engine:
        yield engine


def keys_of(folder: Path, name: str) -> dict[str, Any]:
    return {
        "server_public_key": str(folder / "server.key"),
        "client_secret_key_file": str(folder / "clients" / f"{name}.key_secret"),
    }


@pytest.fixture
def clients(engine: Engine, folder: Path) -> Iterator[dict[str, Client]]:
    names = ("ann", "ben", "admin")
    clients = {
        name: Client(engine.endpoint, timeout_s=GUARD_S, **keys_of(folder, name)) for name in names
    }
    yield clients
    for client in clients.values():
        client.close()


def run(client: Client, **options: Any) -> RequestOutput:
    return list(client.generate(PROMPT, TWO, **options))[-1]


def test_the_owner_alone_and_the_operator_change_an_adapter(clients: dict[str, Client]) -> None:
    ann, ben, admin = clients.values()
    assert ann.load_adapter("mine", "red")["owner"] == "ann"
    for command in (
        lambda: ben.load_adapter("mine", "blue"),
        lambda: ben.load_adapter("mine", "blue", lazy=True),
        lambda: ben.unload_adapter("mine"),
        lambda: ben.pin_adapter("mine"),
    ):
        with pytest.raises(ClientError, match="does not own") as refusal:
            command()
        assert refusal.value.code == "forbidden"
    answer = run(ben, adapter="mine").outputs[0].token_ids  # using it is allowed
    assert answer == expected_tokens(PROMPT, "red", max_tokens=2)
    assert [row["owner"] for row in ben.list_adapters("mine")] == [None]
    assert ann.pin_adapter("mine")["pinned"]
    assert admin.load_adapter("mine", "blue")["owner"] == "ann"
    assert run(ann, adapter="mine").outputs[0].token_ids == expected_tokens(
        PROMPT, "blue", max_tokens=2
    )
    ann.unload_adapter("mine")
    assert admin.list_adapters() == []


def test_cached_tokens_tell_nothing_about_another_tenant(
    engine: Engine, folder: Path, clients: dict[str, Client]
) -> None:
    ann, ben, admin = clients.values()
    assert [run(client, salt="s").num_cached_tokens for client in (ann, ann)] == [0, 48]
    assert [run(client, salt="s").num_cached_tokens for client in (ben, admin)] == [0, 0]
    message = {"type": "generate", "prompt_token_ids": PROMPT, "salt": "s", "stream": False}
    transport = SocketTransport(engine.endpoint, **keys_of(folder, "admin"))
    try:
        for tenant, num_cached in [("ann", 48), ("cid", 0)]:  # the operator acts for them
            transport.send({**message, "request_id": tenant, "tenant": tenant})
            (reply,) = transport.receive(GUARD_S)
            assert reply["usage"]["cached_tokens"] == num_cached
    finally:
        transport.close()


def test_no_tenant_goes_before_others(clients: dict[str, Client]) -> None:
    with pytest.raises(ClientError, match="0 or more") as refusal:
        run(clients["ann"], priority=-1)
    assert refusal.value.code == "forbidden"
    assert run(clients["admin"], priority=-1).finished


def test_a_greedy_tenant_leaves_places_in_the_queue(clients: dict[str, Client]) -> None:
    ann, ben, _ = clients.values()
    long = SamplingParams(max_tokens=100, ignore_eos=True)
    for number in range(30):
        ann.submit([number], long)
    refused = []
    while not refused:
        refused = [r.error for r in ann.poll(GUARD_S) if isinstance(r, RequestFailure)]
    assert all(isinstance(error, QueueFullError) for error in refused)
    assert "of tenant 'ann' wait" in str(refused[0])
    ben.submit(PROMPT, TWO)
    (answer,) = ben.poll(GUARD_S)
    assert isinstance(answer, RequestOutput)
