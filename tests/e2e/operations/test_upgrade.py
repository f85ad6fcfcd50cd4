"""One server takes over from another behind a load balancer, and no request is lost."""

import threading
import time

import httpx
import pytest

from helpers.fakes.fake_engine import expected_tokens
from helpers.serving.served_command import FAKE, HttpStream, ServedCommand, serving

pytestmark = pytest.mark.e2e
NUM_CLIENTS = 4
MAX_TOKENS = 30
LOOK_S = 0.2


class Balancer:
    """Sends requests to the servers whose /ready said 200 at its last look, as proxies do."""

    def __init__(self, *servers: ServedCommand) -> None:
        self.servers = list(servers)
        self.chosen = [server.http for server in servers]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(LOOK_S):
            self.chosen = [server.http for server in self.servers if is_ready(server)]


def is_ready(server: ServedCommand) -> bool:
    try:
        return server.is_ready() == 200
    except httpx.HTTPError:
        return False


class AskingClient:
    """A thread that sends one request after the other. It repeats one that no server has taken.

    Attributes:
        num_whole: answers that came whole.
        wrong: what else came.
    """

    def __init__(self, balancer: Balancer, number: int) -> None:
        self.num_whole = 0
        self.wrong: list[str] = []
        self._balancer, self._number = balancer, number
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        prompt = [5 + self._number, 6]
        expected = expected_tokens(prompt, max_tokens=MAX_TOKENS)
        body = {
            "prompt": prompt, "max_tokens": MAX_TOKENS, "ignore_eos": True,
            "return_token_ids": True,
        }  # fmt: skip
        while not self._over.is_set():
            servers = self._balancer.chosen
            stream = HttpStream(servers[self._number % len(servers)], body).join()
            tokens = [token for choice in stream.choices for token in choice["token_ids"]]
            if tokens == expected:
                self.num_whole += 1
            elif stream.status != 503 and "ConnectError" not in stream.failure:
                self.wrong.append(f"{stream.status} {stream.failure} {stream.events[-1:]}")

    def join(self) -> None:
        self._over.set()
        self._thread.join()


def test_no_request_is_lost() -> None:
    options = ("--drain-grace", "2", "--drain-timeout", "100")
    with serving(*FAKE, *options) as old:
        balancer = Balancer(old)
        clients = [AskingClient(balancer, number) for number in range(NUM_CLIENTS)]
        with serving(*FAKE, *options) as new:
            balancer.servers.append(new)
            while new.http not in balancer.chosen:
                time.sleep(LOOK_S)
            old.signal()
            assert old.wait() == (0, "")
            before = [client.num_whole for client in clients]
            while any(c.num_whole <= n for c, n in zip(clients, before, strict=True)):
                time.sleep(LOOK_S)  # the new one answers everybody
            for client in clients:
                client.join()
            balancer.close()
        assert [client.wrong for client in clients] == [[]] * NUM_CLIENTS
