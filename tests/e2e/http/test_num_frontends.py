"""Several frontends of one engine, HTTP and ZeroMQ, behind one port each."""

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraplex import Client, SamplingParams
from loraplex.engine.config import ServerConfig
from loraplex.engine.errors import ConnectionLostError
from loraplex.engine.processes.engine import Engine

from helpers.fakes.fake_engine import expected_tokens, fake_config
from helpers.running.http_server import Served, http_config, make_models
from helpers.running.mixed_requests import mixed_jobs, texts_over_http, texts_over_zmq
from helpers.running.processes import GUARD_S, running_engine, wait_until

pytestmark = pytest.mark.e2e
NUM_TOKENS = 200
NUM_CLIENTS = 12
BODY = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True, "return_token_ids": True}


@pytest.fixture(scope="module", params=["tcp://127.0.0.1:0", ""], ids=["tcp", "ipc"])
def slow_engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Two frontends of each kind, before a worker that takes 20 ms a step."""
    server = ServerConfig(endpoint=request.param, http="127.0.0.1:0", num_frontends=2)
    with running_engine(replace(fake_config(), server=server), "--delay", "0.02") as engine:
        yield engine


def instance_over_http(engine: Engine, client: httpx.Client) -> str:
    """Returns which frontend serves the client's one connection."""
    return str(client.get(f"http://{engine.http_endpoint}/health").json()["instance"])


def http_clients(stack: ExitStack, engine: Engine) -> dict[httpx.Client, str]:
    """Returns clients with a connection each, to both frontends, by their instances."""
    clients: dict[httpx.Client, str] = {}
    while len(clients) < NUM_CLIENTS or len(set(clients.values())) < 2:
        client = stack.enter_context(httpx.Client(timeout=GUARD_S))
        clients[client] = instance_over_http(engine, client)
    return clients


def tokens_until_the_end(stream: Iterator[str]) -> list[int] | None:
    """Returns the streamed tokens, None if the connection broke."""
    tokens: list[int] = []
    try:
        for line in stream:
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                tokens += event["choices"][0]["token_ids"]
    except httpx.TransportError:
        return None
    return tokens


def test_mixed_requests_over_many_connections_equal_those_over_zmq(tmp_path: Path) -> None:
    make_models(tmp_path)
    with Engine(http_config(tmp_path, num_frontends=2)) as engine:
        engine.start()
        served, jobs = Served(engine, tmp_path), mixed_jobs(100)
        assert set(engine.pids) >= {"frontend 0", "frontend 1", "http 0", "http 1"}
        assert asyncio.run(texts_over_http(served, jobs)) == texts_over_zmq(served, jobs)
        with ExitStack() as stack:
            assert len(set(http_clients(stack, engine).values())) == 2


def test_a_dead_http_frontend_takes_only_its_own_requests_along(slow_engine: Engine) -> None:
    with ExitStack() as stack:
        clients = http_clients(stack, slow_engine)
        url = f"http://{slow_engine.http_endpoint}/v1/completions"
        streams = []
        for i, client in enumerate(clients):
            response = stack.enter_context(
                client.stream("POST", url, json={**BODY, "prompt": [i + 1]})
            )
            lines = response.iter_lines()
            next(lines)
            streams.append(lines)
        pid = slow_engine.pids["http 0"]
        os.kill(pid, signal.SIGKILL)
        answers = [tokens_until_the_end(stream) for stream in streams]
        lost = {instance for instance, a in zip(clients.values(), answers, strict=True) if not a}
        kept = {instance for instance, a in zip(clients.values(), answers, strict=True) if a}
        assert len(lost) == len(kept) == 1 and lost != kept
        for i, answer in enumerate(answers):
            whole = expected_tokens([i + 1], max_tokens=NUM_TOKENS)
            assert answer is None or answer == whole[1:], "the first event was read before"
    with Client(slow_engine.endpoint) as client:
        wait_until(lambda: client.stats()["running"] == 0)
    wait_until(lambda: slow_engine.pids["http 0"] != pid)
    with ExitStack() as stack:
        back = set(http_clients(stack, slow_engine).values())
        assert kept < back and not lost & back


def test_zmq_clients_of_a_dead_frontend_go_on_at_the_other(slow_engine: Engine) -> None:
    long = SamplingParams(max_tokens=NUM_TOKENS)
    with ExitStack() as stack:
        clients: dict[Client, str] = {}
        while len(clients) < NUM_CLIENTS or len(set(clients.values())) < 2:
            client = stack.enter_context(Client(slow_engine.endpoint, timeout_s=GUARD_S))
            clients[client] = client.health()["instance"]
        for i, client in enumerate(clients):
            client.submit([i + 1], long)
            client.health()  # the frontend has the request
        os.kill(slow_engine.pids["frontend 1"], signal.SIGKILL)
        lost, kept = set(), set()
        for i, (client, instance) in enumerate(clients.items()):
            (result,) = client.poll(GUARD_S)
            error: Any = getattr(result, "error", None)
            (kept if error is None else lost).add(instance)
            if error is None:
                tokens = list(result.outputs[0].token_ids)
                assert tokens == expected_tokens([i + 1], max_tokens=NUM_TOKENS)
            else:
                assert isinstance(error, ConnectionLostError)
                *_, last = client.generate([i + 1], SamplingParams(max_tokens=4))
                assert list(last.outputs[0].token_ids) == expected_tokens([i + 1], max_tokens=4)
        assert len(lost) == len(kept) == 1 and lost != kept
