"""A server that gets SIGTERM lets the requests of its clients end."""

import os
import signal

import httpx
import psutil
import pytest

from loraplex import Client, SamplingParams
from loraplex.engine.config import ServerConfig
from loraplex.engine.errors import ClientError, LoraplexError

from helpers.fakes.fake_engine import expected_tokens, fake_config
from helpers.running.processes import running_engine, wait_until
from helpers.serving.served_command import FAKE, HttpStream, serving

pytestmark = pytest.mark.e2e
PROMPT = [5, 6, 7]
HTTP = {"prompt": PROMPT, "max_tokens": 150, "ignore_eos": True, "return_token_ids": True}
ENDLESS = SamplingParams(max_tokens=500)
SHORT = SamplingParams(max_tokens=2)


def tokens_of(stream: HttpStream) -> list[int]:
    return [token for choice in stream.choices for token in choice["token_ids"]]


def test_requests_of_the_grace_are_accepted_and_later_ones_refused() -> None:
    options = ("--drain-grace", "2", "--drain-timeout", "100")
    with serving(*FAKE, *options) as server, Client(server.endpoint) as client:
        running = HttpStream(server.http, HTTP | {"max_tokens": 400})
        running.begun.wait()
        assert server.is_ready() == 200
        server.signal()
        wait_until(lambda: server.is_ready() == 503)
        assert client.health()["status"] == "draining"
        accepted = HttpStream(server.http, HTTP | {"max_tokens": 2})
        (output,) = client.generate(PROMPT, SHORT, stream=False)
        assert output.outputs[0].token_ids == expected_tokens(PROMPT, max_tokens=2)
        assert accepted.join().finish_reason == "length"

        def refused() -> bool:
            answer = httpx.post(f"{server.http}/v1/completions", json=HTTP | {"max_tokens": 2})
            if answer.status_code == 200:
                return False
            assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
            assert "the server is stopping" in answer.json()["error"]["message"]
            return True

        wait_until(refused)
        with pytest.raises(ClientError, match="takes no new requests") as raised:
            list(client.generate(PROMPT, SHORT))
        assert raised.value.code == "draining"
        assert tokens_of(running.join()) == expected_tokens(PROMPT, max_tokens=400)
        assert server.wait() == (0, "")


def test_what_does_not_end_in_time_fails_with_the_reason() -> None:
    with serving(*FAKE, "--drain-timeout", "0.5") as server, Client(server.endpoint) as client:
        stream = HttpStream(server.http, HTTP | {"max_tokens": 500})
        stream.begun.wait()
        answer = client.generate(PROMPT, ENDLESS)
        next(answer)
        server.signal()
        with pytest.raises(LoraplexError, match="did not end within 0.5 s more"):
            list(answer)
        assert "did not end within 0.5 s more" in stream.join().events[-1]["error"]["message"]
        assert server.wait() == (0, "")
        assert "stopping: requests are accepted until 0 s after the signal" in server.lines[-1]


def test_a_second_signal_ends_at_once() -> None:
    with serving(*FAKE, "--drain-grace", "500") as server, Client(server.endpoint) as client:
        answer = client.generate(PROMPT, ENDLESS)
        next(answer)
        server.signal()
        wait_until(lambda: server.is_ready() == 503)
        server.signal(signal.SIGINT)
        with pytest.raises(LoraplexError):
            list(answer)
        assert server.wait()[0] == 0


def test_an_idle_server_stops() -> None:
    with serving(*FAKE) as server:
        server.signal()
        assert server.wait() == (0, "")


def test_a_frontend_that_dies_meanwhile_is_not_started_again() -> None:
    options = ("--drain-timeout", "500")
    with serving(*FAKE, *options) as server, Client(server.endpoint) as client:
        stream = HttpStream(server.http, HTTP)
        stream.begun.wait()
        answer = client.generate(PROMPT, ENDLESS)
        next(answer)
        pid = frontend_pid(server.process.pid)
        server.signal()
        wait_until(lambda: server.is_ready() == 503)
        os.kill(pid, signal.SIGKILL)
        assert tokens_of(stream.join()) == expected_tokens(PROMPT, max_tokens=150)
        status, err = server.wait()
        assert status == 0 and "the requests of its clients have failed" in err


def frontend_pid(server: int) -> int:
    (pid,) = [
        child.pid
        for child in psutil.Process(server).children()
        if any(part.endswith("frontend_main") for part in child.cmdline())
    ]
    return pid


def test_stop_of_an_engine_in_a_program_does_not_wait() -> None:
    config = fake_config(server=ServerConfig(endpoint="", drain_grace=500, drain_timeout=500))
    with running_engine(config, "--delay", "0.02") as engine:
        client = Client(engine.endpoint)
        answer = client.generate(PROMPT, ENDLESS)
        next(answer)
        engine.stop()
        with pytest.raises(LoraplexError, match="the engine was stopped"):
            list(answer)
        client.close()
