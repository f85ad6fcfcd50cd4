"""Requests with a time limit, at each entrance."""

from functools import partial

import httpx
import pytest

from loraplex import Client, SamplingParams
from loraplex.engine.errors import ClientError
from loraplex.engine.processes.in_process import InProcessEngine

from helpers.fakes.fake_engine import FakeEngineWorker, fake_config
from helpers.serving.served_command import FAKE, HttpStream, serving

pytestmark = pytest.mark.e2e
ENDLESS = SamplingParams(max_tokens=500)
TEXT = "did not end within 0.5 s"


def test_every_entrance_ends_late_requests() -> None:
    body = {"prompt": [5, 6], "max_tokens": 500, "ignore_eos": True, "timeout_s": 0.5}
    with serving(*FAKE) as server, Client(server.endpoint) as client:
        stream = HttpStream(server.http, body | {"return_token_ids": True}).join()
        assert stream.status == 200
        assert TEXT in stream.events[-1]["error"]["message"]
        answer = httpx.post(f"{server.http}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 504
        assert answer.json()["error"]["type"] == "TimeoutError"
        with pytest.raises(ClientError, match=TEXT) as raised:
            list(client.generate([5, 6], ENDLESS, deadline_s=0.5))
        assert raised.value.code == "timeout"
        assert client.stats()["running"] == 0


def test_an_engine_in_this_process_ends_late_requests() -> None:
    engine = InProcessEngine(fake_config(), worker=partial(FakeEngineWorker, delay_s=0.02))
    with Client(engine) as client, pytest.raises(ClientError, match=TEXT):
        list(client.generate([5, 6], ENDLESS, deadline_s=0.5))
