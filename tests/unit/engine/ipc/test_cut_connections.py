"""A connection that is cut between a router and an engine on another machine."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import zmq

from loraplex.engine.ipc.channel import DealerChannel, PeerGoneError, RouterChannel
from loraplex.engine.ipc.messages.lifecycle import ChildProgress

GUARD_S = 30.0


class Relay:
    """Passes bytes on between a port of its own and another one, until it cuts what is open."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.num_connections = 0
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            far = socket.create_connection(("127.0.0.1", self._target))
            self.num_connections += 1
            self._open += [near, far]
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(4096):
                target.sendall(data)
        except OSError:
            pass
        target.close()

    def cut(self) -> None:
        for end in self._open:
            with contextlib.suppress(OSError):  # its thread has closed it since the other end's cut
                end.shutdown(socket.SHUT_RDWR)
        self._open.clear()


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    """Is destroyed also if the test fails: its finalizer would wait for open sockets."""
    made = zmq.Context()
    yield made
    made.destroy(linger=0)


@pytest.mark.parametrize("reconnects", [True, False])
def test_a_link_of_a_router_stays_silent_after_a_cut(
    context: zmq.Context[zmq.Socket[bytes]], reconnects: bool
) -> None:
    """Outputs were lost in the cut, so those after it must not reach a stream."""
    engine = RouterChannel(context, "inproc://unused")
    relay = Relay(int(engine.bind_port("127.0.0.1").rpartition(":")[2]))
    address = f"tcp://127.0.0.1:{relay.port}"
    link = DealerChannel(context, address, b"router", reconnects=reconnects)
    link.send(ChildProgress("hello"))
    assert engine.socket.poll(1000 * GUARD_S)
    engine.receive()
    engine.send(ChildProgress("output"), b"router")
    assert link.socket.poll(1000 * GUARD_S)
    assert [message.text for _, message in link.receive()] == ["output"]
    relay.cut()
    deadline = time.monotonic() + (GUARD_S if reconnects else 0.3)
    while relay.num_connections == 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert relay.num_connections == 1 + reconnects
    if not reconnects:
        deadline = time.monotonic() + GUARD_S
        with pytest.raises(PeerGoneError):  # once the engine has seen the cut
            while time.monotonic() < deadline:
                engine.send(ChildProgress("an output after it"), b"router")
                time.sleep(0.01)
        assert not link.receive()
