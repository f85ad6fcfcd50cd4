"""Clients against the real processes; the worker computes a hash instead of a model."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from loraplex.engine.config import AdapterConfig, ModelConfig, ServerConfig
from loraplex.engine.errors import ClientError, UnknownAdapterError
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.engine.processes.engine import Engine
from loraplex.entrypoints.client.async_client import AsyncClient
from loraplex.entrypoints.client.sync_client import Client

from helpers.fakes.fake_engine import NUM_PAGES, expected_tokens, fake_config, make_fake_adapter
from helpers.models.hf_models import make_tokenizer
from helpers.running.processes import GUARD_S, running_engine, wait_until

pytestmark = pytest.mark.e2e
ADAPTERS = ["", "a0", "a1", "a2", "a3", "a4", "a5"]


def content(adapter: str) -> str:
    return f"content of {adapter}" if adapter else ""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    root: Path = tmp_path_factory.mktemp("adapters")
    for name in ADAPTERS[1:]:
        make_fake_adapter(root / name, content(name))
    make_fake_adapter(root.parent / "late" / "x", "late")
    config = fake_config(
        adapter=AdapterConfig(adapter_dir=str(root), adapter_root=str(root.parent))
    )
    with running_engine(config, "--delay", "0.005") as engine:
        yield engine


@pytest.fixture
def client(engine: Engine) -> Iterator[Client]:
    with Client(engine.endpoint) as client:
        yield client


def params(max_tokens: int, **values: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **values)


def test_the_first_token_arrives_before_the_last_is_generated(client: Client) -> None:
    """Pieces that meet on the way are joined, so that only the first one's length is known."""
    lengths = [len(o.outputs[0].token_ids) for o in client.generate([1, 2], params(450))]
    assert 0 < lengths[0] < lengths[-1] == 450
    assert lengths == sorted(set(lengths)), "a piece brought no token"


def test_fifty_clients_with_mixed_adapters_get_their_own(engine: Engine) -> None:
    barrier = threading.Barrier(50)

    def one(i: int) -> None:
        adapter, prompt = ADAPTERS[i % len(ADAPTERS)], [i, i + 1, 7]
        with Client(engine.endpoint) as client:
            barrier.wait(GUARD_S)
            for turn in range(2):
                length = 5 + (i + turn) % 20
                options: dict[str, Any] = {"adapter": adapter, "stream": i % 3 > 0}
                *_, output = client.generate(prompt, params(length), **options)
                expected = expected_tokens(prompt, content(adapter), max_tokens=length)
                assert output.outputs[0].token_ids == expected, (i, turn, adapter)

    with ThreadPoolExecutor(50) as pool:
        for result in [pool.submit(one, i) for i in range(50)]:
            result.result(GUARD_S)


def pages_are_free(client: Client) -> bool:
    stats = client.stats()
    idle = stats["pages_free"] + stats["pages_prefix"] + stats["pages_adapter"]
    return stats["running"] == stats["waiting"] == stats["pages_kv"] == 0 and idle == NUM_PAGES - 1


def test_cancelling_frees_the_pages(client: Client) -> None:
    ids = [client.submit([1, i], params(400), adapter=ADAPTERS[i % 7]) for i in range(30)]
    wait_until(lambda: client.stats()["pages_kv"] > 0)
    for request_id in ids:
        client.cancel(request_id)
    reasons = []
    while client.num_outstanding:
        reasons += [result.outputs[0].finish_reason for result in client.poll(GUARD_S)]  # type: ignore[union-attr]
    assert reasons == ["abort"] * 30
    wait_until(lambda: pages_are_free(client))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_frees_the_pages(
    engine: Engine, client: Client, stream: bool
) -> None:
    context = zmq.Context()
    sockets = [context.socket(zmq.DEALER) for _ in range(5)]
    for i, socket in enumerate(sockets):
        socket.connect(engine.endpoint)
        request = {"type": "generate", "request_id": "r", "prompt_token_ids": [i, 1],
                   "sampling_params": {"max_tokens": 450}, "stream": stream}  # fmt: skip
        socket.send(msgpack.packb(request))
    wait_until(lambda: client.stats()["running"] == 5)
    context.destroy(linger=0)  # no "bye": as a killed client would
    wait_until(lambda: pages_are_free(client))
    assert client.stats()["frontend"]["lost_clients"] >= 5


def test_closing_a_client_frees_the_pages_at_once(engine: Engine, client: Client) -> None:
    """The goodbye frees them; the frontend need not find out that the client is lost."""
    num_lost = client.stats()["frontend"]["lost_clients"]
    other = Client(engine.endpoint)
    other.submit([1], params(450))
    wait_until(lambda: client.stats()["running"] == 1)
    other.close()
    wait_until(lambda: pages_are_free(client))
    assert client.stats()["frontend"]["lost_clients"] == num_lost


def test_adapters_come_and_go_over_the_wire(
    client: Client, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = tmp_path_factory.getbasetemp()
    listed = {adapter["name"] for adapter in client.list_adapters()}
    assert listed == set(ADAPTERS[1:])
    client.load_adapter("late", str(base / "late" / "x"))
    *_, output = client.generate([3], params(5), adapter="late")
    assert output.outputs[0].token_ids == expected_tokens([3], "late", max_tokens=5)
    assert client.pin_adapter("late")["pinned"]
    (listed_late,) = client.list_adapters("late")
    assert (listed_late["tier"], listed_late["usage"]["num_ended"]) == ("pages", 1)
    client.unload_adapter("late")
    assert client.stats()["pages_pinned"] == 0
    with pytest.raises(UnknownAdapterError):
        list(client.generate([3], params(5), adapter="late"))
    with pytest.raises(ClientError) as caught:
        client.load_adapter("evil", "/etc")
    assert caught.value.code == "forbidden"


def test_asyncio_clients_stream_side_by_side(engine: Engine) -> None:
    async def one(client: AsyncClient, i: int) -> list[int]:
        adapter = ADAPTERS[i % 7]
        async for output in client.generate([i], params(20), adapter=adapter):
            tokens = output.outputs[0].token_ids
        assert tokens == expected_tokens([i], content(adapter), max_tokens=20)
        return tokens

    async def main() -> None:
        async with AsyncClient(engine.endpoint) as client:
            assert (await client.health())["status"] == "ok"
            assert len(await client.list_adapters()) == 6
            assert (await client.pin_adapter(ADAPTERS[1]))["pinned"]
            assert (await client.list_adapters(ADAPTERS[1]))[0]["pinned"]
            assert not (await client.unpin_adapter(ADAPTERS[1]))["pinned"]
            await asyncio.gather(*(one(client, i) for i in range(20)))
            task = asyncio.create_task(consume(client))
            await until_running(client, 1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            stream = client.generate([1], params(450))
            async for _ in stream:
                break
            await stream.aclose()  # type: ignore[attr-defined]
            await until_running(client, 0)
            assert (await client.stats())["pages_kv"] == 0
            with pytest.raises(UnknownAdapterError):
                async for _ in client.generate([1], params(4), adapter="nobody"):
                    pass
            with pytest.raises(TimeoutError):
                async for _ in client.generate([1], params(450), stream=False, timeout_s=0.05):
                    pass

    async def consume(client: AsyncClient) -> None:
        async for _ in client.generate([1], params(450)):
            pass

    async def until_running(client: AsyncClient, num: int) -> None:
        while (await client.stats())["running"] != num:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(main(), GUARD_S))


def test_a_plain_socket_and_messagepack_are_enough(engine: Engine) -> None:
    """docs/reference/protocol.md promises this to other languages."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(engine.endpoint)
        request = {"type": "generate", "request_id": "1", "prompt_token_ids": [1, 2],
                   "sampling_params": {"max_tokens": 3, "temperature": 0}}  # fmt: skip
        socket.send(msgpack.packb(request))
        tokens: list[int] = []
        finished = False
        while not finished:
            assert socket.poll(int(GUARD_S * 1000))
            reply = msgpack.unpackb(socket.recv())
            if reply["type"] == "ping":
                continue
            assert (reply["type"], reply["request_id"]) == ("output", "1")
            tokens += reply["outputs"][0]["token_ids"]
            finished = reply["finished"]
        assert tokens == expected_tokens([1, 2], max_tokens=3)


def test_text_through_the_processes(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    config = fake_config(model=ModelConfig(model=str(tmp_path)))
    with running_engine(config) as engine, Client(engine.endpoint) as client:
        pieces = list(client.generate("hello", SamplingParams(max_tokens=30, ignore_eos=True)))
        text = pieces[-1].outputs[0].text
        assert len(text) > 10
        stop = text[5:8]
        *_, cut = client.generate("hello", SamplingParams(max_tokens=30, stop=[stop]))
        assert cut.outputs[0].text == text[: text.index(stop)]
        wait_until(lambda: pages_are_free(client))
        *_, chat = client.chat([{"role": "user", "content": "hi"}], params(4))
        assert chat.finished
        with pytest.raises(ClientError, match="max_model_len") as caught:
            list(client.generate("long text " * 20_000, params(4)))
        assert caught.value.code == "prompt_too_long"


def test_a_client_that_does_not_read_is_cut_off_and_the_others_are_not(tmp_path: Path) -> None:
    config = fake_config()
    server = ServerConfig(endpoint="tcp://127.0.0.1:0", max_client_backlog=10)
    with running_engine(replace(config, server=server)) as engine:
        context = zmq.Context()
        socket = context.socket(zmq.DEALER)
        socket.rcvhwm = 1
        socket.rcvbuf = 1024
        socket.connect(engine.endpoint)
        for i in range(400):
            socket.send(msgpack.packb({
                "type": "generate", "request_id": str(i), "prompt_token_ids": [i % 300],
                "sampling_params": {"max_tokens": 450, "logprobs": 0}}))  # fmt: skip
        with Client(engine.endpoint) as client:
            wait_until(lambda: client.stats()["frontend"]["slow_clients"] > 0)
            wait_until(lambda: client.stats()["running"] == 0)
            *_, output = client.generate([1], params(5))
            assert output.finished
            codes = set()
            while "slow_client" not in codes:
                assert socket.poll(int(GUARD_S * 1000)), "the client is not told why"
                codes.add(msgpack.unpackb(socket.recv()).get("code"))
        context.destroy(linger=0)
