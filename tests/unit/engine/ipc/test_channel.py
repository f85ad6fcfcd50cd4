"""Both transports obey the same rules."""

import threading
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from loraplex.engine.ipc.channel import (
    DealerChannel,
    InprocChannel,
    PeerGoneError,
    RouterChannel,
    SlowPeerError,
    Wakeup,
    open_socket,
)
from loraplex.engine.ipc.messages.frontend import AbortRequests, EngineDead, StatsQuery

PEER = b"frontend-0"


@pytest.fixture
def context() -> Iterator[Any]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture(params=["sockets", "inproc"])
def ends(request: pytest.FixtureRequest, context: Any, tmp_path: Path) -> Any:
    if request.param == "inproc":
        return InprocChannel.pair(PEER)
    endpoint = f"ipc://{tmp_path}/edge"
    return RouterChannel(context, endpoint), DealerChannel(context, endpoint, PEER)


def receive(channel: Any, count: int) -> list[tuple[bytes, Any]]:
    messages: list[tuple[bytes, Any]] = []
    for _ in range(12_000):
        messages += channel.receive()
        if len(messages) >= count:
            return messages
        threading.Event().wait(0.01)
    raise AssertionError(f"only {len(messages)} messages came")


def test_messages_come_in_order_with_their_peer(ends: Any) -> None:
    router, dealer = ends
    sent = [StatsQuery(i) for i in range(50)]
    for message in sent:
        dealer.send(message)
    assert receive(router, 50) == [(PEER, message) for message in sent]
    router.send(EngineDead("x"), PEER)
    router.send(AbortRequests(array("q", [7])), PEER)
    assert receive(dealer, 2) == [(b"", EngineDead("x")), (b"", AbortRequests(array("q", [7])))]
    assert router.receive() == []
    assert dealer.receive() == []


def test_an_unknown_peer_is_an_error_not_a_loss(ends: Any) -> None:
    router, _ = ends
    with pytest.raises(PeerGoneError):
        router.send(StatsQuery(1), b"frontend-9")


def test_a_peer_that_left_is_an_error(ends: Any) -> None:
    router, dealer = ends
    dealer.send(StatsQuery(1))
    receive(router, 1)
    dealer.close()
    for _ in range(12_000):
        try:
            router.send(StatsQuery(2), PEER)
        except PeerGoneError:
            return
        threading.Event().wait(0.01)
    raise AssertionError("sending to a closed peer never failed")


def test_a_peer_that_does_not_read_is_told_apart(context: Any, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/edge"
    router = RouterChannel(context, endpoint)
    slow = open_socket(context, zmq.DEALER, hwm=1, identity=PEER)
    slow.connect(endpoint)
    channel = DealerChannel(context, endpoint, b"other")
    channel.send(StatsQuery(0))
    from loraplex.engine.ipc import codec

    slow.send(codec.encode(StatsQuery(1)))
    receive(router, 2)
    with pytest.raises(SlowPeerError):
        for _ in range(300_000):
            router.send(StatsQuery(2), PEER)
    router.send(StatsQuery(3), b"other")  # the others are not held up
    assert receive(channel, 1) == [(b"", StatsQuery(3))]


def test_wakeup_wakes_a_poller_from_any_thread_and_coalesces() -> None:
    wakeup = Wakeup()
    poller = zmq.Poller()
    poller.register(wakeup.fileno(), zmq.POLLIN)
    assert poller.poll(0) == []
    threads = [threading.Thread(target=wakeup.set) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert poller.poll(2000)
    for thread in threads:
        thread.join()
    for _ in range(100_000):  # more than a pipe holds: must neither block nor fail
        wakeup.set()
    wakeup.clear()
    assert poller.poll(0) == []
    wakeup.close()


def test_peers_take_turns_and_nothing_is_lost_or_reordered(context: Any) -> None:
    """One peer's burst does not hold up another peer's message."""
    router = RouterChannel(context, "inproc://turns")  # where a message has arrived once it is sent
    loud = DealerChannel(context, "inproc://turns", b"loud")
    quiet = DealerChannel(context, "inproc://turns", b"quiet")
    for i in range(100):
        loud.send(StatsQuery(i))
    for i in range(5):
        quiet.send(StatsQuery(i))
    taken = [router.receive(10) for _ in range(12)]
    assert [len(messages) for messages in taken] == [10] * 10 + [5, 0]
    assert sum(peer == b"quiet" for peer, _ in taken[0]) >= 4
    for name, count in ((b"loud", 100), (b"quiet", 5)):
        ids = [m.query_id for messages in taken for peer, m in messages if peer == name]
        assert ids == list(range(count))


def test_what_is_over_the_limit_stays_for_the_next_call() -> None:
    router, dealer = InprocChannel.pair(b"worker-0")
    for i in range(5):
        dealer.send(StatsQuery(i))
    taken = [[m.query_id for _, m in router.receive(2)] for _ in range(4)]
    assert taken == [[0, 1], [2, 3], [4], []]
