"""Memory that clients hold in a frontend is bounded in bytes."""

from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from loraplex.engine.config import ServerConfig
from loraplex.engine.frontend.byte_budget import ByteBudget
from loraplex.engine.frontend.client_socket import ClientSocket
from loraplex.engine.frontend.clients import ClientTable
from loraplex.engine.frontend.inputs import TextCodec
from loraplex.engine.ipc.channel import SlowPeerError
from loraplex.scheduler.frontend_protocol import AddRequest

from helpers.fakes.frontend_harness import A, B, FrontendHarness

MIB = 1 << 20


class NeverDone:
    """Requests that end only when the client is cut off."""

    def __init__(self) -> None:
        self.dropped: list[bytes] = []

    def has_requests(self, client: bytes) -> bool:
        return client not in self.dropped

    def drop_client(self, client: bytes) -> list[str]:
        self.dropped.append(client)
        return ["r"]


def nobody_reads(client: bytes, data: bytes) -> None:
    raise SlowPeerError("slow")


def test_unread_replies_of_one_client_are_bounded_in_bytes() -> None:
    requests = NeverDone()
    budget = ByteBudget(for_each=10_000, in_all=1 << 30)
    clients = ClientTable(nobody_reads, requests, max_unread=1 << 30, budget=budget)
    while not requests.dropped:
        clients.reply(A, {"text": "x" * 1000})
        assert clients.num_unread_bytes <= 10_000
    assert requests.dropped == [A]
    assert 0 < clients.num_unread_bytes < 1000  # the error


def test_unread_replies_of_all_are_bounded_at_the_cost_of_who_leaves_most() -> None:
    requests = NeverDone()
    budget = ByteBudget(for_each=1 << 30, in_all=10_000)
    clients = ClientTable(nobody_reads, requests, max_unread=1 << 30, budget=budget)
    clients.reply(B, {"text": "x" * 1000})
    while not requests.dropped:
        clients.reply(A, {"text": "x" * 1000})
        assert clients.num_unread_bytes <= 10_000
    assert requests.dropped == [A]
    for _ in range(3):
        clients.reply(B, {"text": "x" * 1000})
    assert requests.dropped == [A]


def test_unfinished_requests_are_bounded_in_bytes(codec: TextCodec) -> None:
    harness = FrontendHarness(codec, max_model_len=100_000)

    def ask(client: bytes, request_id: str) -> str:
        harness.ask(
            client, request_id=request_id, prompt_token_ids=[5] * 60_000, sampling_params={"n": 64}
        )
        replies = harness.take(client)
        return replies[0]["code"] if replies else "accepted"

    codes = [ask(A, str(i)) for i in range(6)]
    assert codes == ["accepted"] * 4 + ["queue_full"] * 2
    assert harness.stats["prompt_bytes"] <= 64 * MIB
    assert ask(B, "0") == "accepted"
    others = [ask(b"%d" % i, "0") for i in range(16)]
    assert "queue_full" in others
    assert harness.stats["prompt_bytes"] <= 256 * MIB
    harness.ask(A, "cancel", request_id="0")
    harness.take()
    assert ask(A, "6") == "accepted"
    for client in (A, B, *(b"%d" % i for i in range(16))):
        harness.frontend.on_message(client, {"type": "bye"})
    assert harness.stats["prompt_bytes"] == 0
    assert harness.take_sent(AddRequest)


def test_a_socket_keeps_few_large_replies_for_a_client_that_does_not_read(tmp_path: Path) -> None:
    with zmq.Context() as context:
        server = ClientSocket(context, ServerConfig(endpoint=f"ipc://{tmp_path}/s"), "")
        client = context.socket(zmq.DEALER)
        client.linger = 0
        client.rcvhwm = 1
        client.connect(server.endpoint)
        client.send(b"x")
        known: list[bytes] = []
        while not known:
            server.receive(lambda client, frames, tenant: known.append(client))
        large = bytes(8 * MIB)
        with pytest.raises(SlowPeerError):
            for _ in range(12):
                server.send(known[0], large)
        server.socket.linger = 0
        server.close()
        client.close()


def test_a_client_reads_a_large_reply_whole_and_in_order(tmp_path: Path) -> None:
    with zmq.Context() as context:
        server = ClientSocket(context, ServerConfig(endpoint=f"ipc://{tmp_path}/s"), "")
        client = context.socket(zmq.DEALER)
        client.connect(server.endpoint)
        client.send(b"x")
        known: list[bytes] = []
        while not known:
            server.receive(lambda client, frames, tenant: known.append(client))
        sent = [{"type": "stats", "text": "x" * length} for length in (1, MIB, 2)]
        for message in sent:
            server.send(known[0], msgpack.packb(message))
        got: list[Any] = []
        while len(got) < len(sent):
            message = msgpack.unpackb(client.recv())
            if message["type"] != "ping":
                got.append(message)
        assert got == sent
        server.close()
        client.close()


def test_a_socket_takes_few_large_messages_ahead(tmp_path: Path) -> None:
    with zmq.Context() as context:
        server = ClientSocket(context, ServerConfig(endpoint=f"ipc://{tmp_path}/s"), "")
        client = context.socket(zmq.DEALER)
        client.linger, client.sndhwm = 0, 1
        client.connect(server.endpoint)
        num_sent = 0
        with pytest.raises(zmq.Again):
            for num_sent in range(30):
                client.send(bytes(8 * MIB), zmq.DONTWAIT if num_sent > 20 else 0)
                if num_sent > 3 and not client.poll(500, zmq.POLLOUT):
                    raise zmq.Again
        assert num_sent < 15
        server.close()
        client.close()


@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
def test_vanished_clients_are_noticed_without_heartbeats_of_the_server(
    scheme: str, tmp_path: Path
) -> None:
    endpoint = "tcp://127.0.0.1:0" if scheme == "tcp" else f"ipc://{tmp_path}/s"
    with zmq.Context() as context:
        server = ClientSocket(context, ServerConfig(endpoint=endpoint), "")
        assert 0 < server.socket.getsockopt(zmq.TCP_KEEPALIVE_IDLE) <= 5
        # libzmq aborts where its heartbeats meet a client that leaves: test_leaving_clients
        assert server.socket.getsockopt(zmq.HEARTBEAT_IVL) == 0
        server.close()
