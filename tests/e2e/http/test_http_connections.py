"""Clients that leave, read slowly or are many, and a server that starts, dies and stops."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from loraplex import Client
from loraplex.engine.config import ServerConfig
from loraplex.engine.errors import ConfigError
from loraplex.engine.processes.engine import Engine
from loraplex.scheduler.config import SchedulerConfig

from helpers.fakes.fake_engine import expected_tokens, fake_config
from helpers.running.processes import GUARD_S, make_engine, running_engine, wait_until

pytestmark = pytest.mark.e2e
LONG: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 500, "ignore_eos": True}


def config_with_http(**parts: Any) -> Any:
    config = fake_config(**parts)
    return replace(config, server=ServerConfig(endpoint="", http="127.0.0.1:0"))


@pytest.fixture(scope="module")
def slow_engine() -> Iterator[Engine]:
    """An engine that takes 20 ms a step: no long request ends during a test by itself."""
    with running_engine(config_with_http(), "--delay", "0.02") as engine:
        yield engine


def url(engine: Engine) -> str:
    return f"http://{engine.http_endpoint}"


def stats(engine: Engine) -> dict[str, Any]:
    with Client(engine.endpoint) as client:
        return client.stats()


def connect(engine: Engine) -> socket.socket:
    host, port = engine.http_endpoint.rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=GUARD_S)


def send(connection: socket.socket, body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    connection.sendall(head.encode() + data)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompts", [1, 4])
def test_a_client_that_breaks_off_frees_its_pages(
    stream: bool, prompts: int, slow_engine: Engine
) -> None:
    wait_until(lambda: stats(slow_engine)["running"] == 0)
    body = {**LONG, "prompt": [[5, 6, i] for i in range(prompts)], "stream": stream, "n": 2}
    with connect(slow_engine) as connection:
        send(connection, body)
        wait_until(lambda: stats(slow_engine)["running"] == 2 * prompts)
        assert stats(slow_engine)["pages_kv"] > 0
    wait_until(lambda: stats(slow_engine)["running"] == 0)
    assert stats(slow_engine)["pages_kv"] == 0


def test_the_openai_client_breaks_off(slow_engine: Engine) -> None:
    api = openai.OpenAI(base_url=f"{url(slow_engine)}/v1", api_key="none", max_retries=0)
    stream = api.completions.create(
        model="fake", prompt=[5], max_tokens=500, stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )  # fmt: skip
    next(iter(stream))
    assert stats(slow_engine)["running"] == 1
    stream.close()
    wait_until(lambda: stats(slow_engine)["running"] == 0)


def test_a_body_that_ends_early_does_no_harm(slow_engine: Engine) -> None:
    with connect(slow_engine) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n{"
        )
    assert httpx.get(f"{url(slow_engine)}/health").status_code == 200


def test_a_client_that_does_not_read_is_cut_off() -> None:
    """The client asks for far more bytes than the server keeps for it."""
    config = config_with_http(scheduler=SchedulerConfig(max_num_seqs=64))
    with running_engine(config) as engine, Client(engine.endpoint) as client:
        with connect(engine) as connection:
            send(connection, {**LONG, "n": 60, "stream": True, "logprobs": 20})
            wait_until(lambda: client.stats()["running"] > 0)
            wait_until(lambda: client.stats()["running"] + client.stats()["waiting"] == 0)
            assert client.stats()["num_generated_tokens"] < 60 * 500
            assert httpx.get(f"{url(engine)}/health").status_code == 200
            text = b""
            while not text.endswith(b"0\r\n\r\n"):
                part = connection.recv(1 << 16)
                assert part, "the answer has no end"
                text = text[-4096:] + part
        assert b"the client left too much of the stream unread" in text


def test_a_thousand_open_connections(slow_engine: Engine) -> None:
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connect(slow_engine)) for _ in range(1000)]
        assert httpx.get(f"{url(slow_engine)}/health").status_code == 200
        send(idle[500], {**LONG, "max_tokens": 2, "return_token_ids": True})
        answer = b""
        while b"usage" not in answer:
            answer += idle[500].recv(65536)
        assert b"200 OK" in answer


def test_streams_at_once_are_whole_and_in_order() -> None:
    async def ask(api: openai.AsyncOpenAI, i: int) -> list[int]:
        stream = await api.completions.create(
            model="fake", prompt=[i], max_tokens=40, stream=True,
            extra_body={"return_token_ids": True},
        )  # fmt: skip
        return [t async for chunk in stream for t in chunk.choices[0].model_dump()["token_ids"]]

    async def ask_all(base_url: str) -> list[list[int]]:
        async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as api:
            return list(await asyncio.gather(*(ask(api, i) for i in range(100))))

    with running_engine(config_with_http()) as engine:
        answers = asyncio.run(ask_all(f"{url(engine)}/v1"))
    assert answers == [expected_tokens([i], max_tokens=40) for i in range(100)]


def test_a_full_queue_is_429() -> None:
    scheduler = SchedulerConfig(max_num_seqs=1, max_queue_len=1)
    config = config_with_http(scheduler=scheduler)
    with running_engine(config, "--delay", "0.05") as engine:
        body = {**LONG, "prompt": [[1], [2], [3], [4]]}
        response = httpx.post(f"{url(engine)}/v1/completions", json=body, timeout=GUARD_S)
        assert response.status_code == 429
        assert response.json()["error"]["type"] == "RateLimitError"
        assert response.headers["retry-after"] == "1"
        wait_until(lambda: stats(engine)["running"] == 0)


def test_a_server_that_dies_is_started_again_at_its_address(slow_engine: Engine) -> None:
    address = slow_engine.http_endpoint
    with connect(slow_engine) as connection:
        send(connection, {**LONG, "stream": True})
        wait_until(lambda: stats(slow_engine)["running"] == 1)
        pid = slow_engine.pids["http 0"]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: slow_engine.pids["http 0"] != pid)
        wait_until(lambda: _status(slow_engine, "/ready") == 200)
    wait_until(lambda: stats(slow_engine)["running"] == 0)
    assert slow_engine.http_endpoint == address
    body = {**LONG, "max_tokens": 3, "return_token_ids": True}
    answer = httpx.post(f"{url(slow_engine)}/v1/completions", json=body).json()
    assert answer["choices"][0]["token_ids"] == expected_tokens([5, 6, 7], max_tokens=3)


def _status(engine: Engine, path: str) -> int:
    try:
        return httpx.get(f"{url(engine)}{path}").status_code
    except httpx.TransportError:
        return 0


@pytest.mark.parametrize("stream", [True, False])
def test_the_engines_end_reaches_the_clients(stream: bool) -> None:
    with running_engine(config_with_http(), "--delay", "0.05", "--crash-after", "40") as engine:
        body = {**LONG, "stream": stream, "return_token_ids": True}
        response = httpx.post(f"{url(engine)}/v1/completions", json=body, timeout=GUARD_S)
        if stream:
            *_, error, done = response.text.strip().split("\n\n")
            assert done == "data: [DONE]"
            value = json.loads(error.removeprefix("data: "))
        else:
            assert response.status_code == 503
            value = response.json()
        assert value["error"]["code"] == 503 and "worker 0" in value["error"]["message"]


def test_a_starting_server_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    config = fake_config()
    address = f"127.0.0.1:{port}"
    config = replace(config, server=ServerConfig(endpoint="", http=address))
    engine = make_engine(config, "--hang")
    starting = threading.Thread(target=_start, args=(engine,))
    starting.start()
    engine.http_endpoint = address
    wait_until(lambda: _status(engine, "/health") != 0)
    assert _status(engine, "/health") == _status(engine, "/ready") == 503
    body = {**LONG, "model": "fake"}
    response = httpx.post(f"{url(engine)}/v1/completions", json=body)
    assert response.status_code == 503 and "starting" in response.json()["error"]["message"]
    assert httpx.get(f"{url(engine)}/version").status_code == 200
    os.kill(engine.pids["worker 0"], signal.SIGKILL)  # ends the start
    starting.join()


def _start(engine: Engine) -> None:
    with contextlib.suppress(Exception):
        engine.start(timeout_s=GUARD_S)


@pytest.mark.parametrize(
    ("http", "text"),
    [
        ("0.0.0.0:0", "reachable from other machines"),
        ("8000", "http must be HOST:PORT"),
        ("127.0.0.1:99999", "http must be HOST:PORT"),
    ],
)
def test_addresses_that_are_refused(http: str, text: str) -> None:
    config = replace(fake_config(), server=ServerConfig(endpoint="", http=http))
    with pytest.raises(ConfigError, match=text):
        make_engine(config).start()


def test_an_address_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = replace(fake_config(), server=ServerConfig(endpoint="", http=address))
        with pytest.raises(ConfigError, match="cannot listen on http"):
            make_engine(config).start(timeout_s=GUARD_S)
