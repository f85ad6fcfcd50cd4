"""Addresses at which several processes listen."""

import os
import socket
from collections import Counter
from pathlib import Path

import pytest

from loraplex.engine.config import ServerConfig
from loraplex.engine.errors import ConfigError
from loraplex.engine.processes.addresses.shared_address import SharedAddress, open_addresses


def accept_all(listeners: list[socket.socket]) -> Counter[int]:
    """Returns how many connections wait at each listener, by its number."""
    counts: Counter[int] = Counter()
    for number, listener in enumerate(listeners):
        listener.setblocking(False)
        while True:
            try:
                listener.accept()[0].close()
            except BlockingIOError:
                break
            counts[number] += 1
    return counts


def listening(address: SharedAddress) -> socket.socket:
    listener = address.open()
    listener.listen(128)
    return listener


def connect(target: socket.socket, count: int) -> list[socket.socket]:
    return [socket.create_connection(target.getsockname(), timeout=60) for _ in range(count)]


def test_connections_are_shared_out_among_the_processes_that_listen() -> None:
    address = SharedAddress(("127.0.0.1", 0))
    first, second, silent = listening(address), listening(address), address.open()
    connections = connect(first, 100)
    counts = accept_all([first, second])
    assert counts.total() == 100 and min(counts.values()) > 10, "a fair coin, by chance 1e-16"
    second.close()  # its process has died
    connections += connect(first, 50)
    assert accept_all([first]).total() == 50
    second = listening(address)  # it was started again
    connections += connect(first, 100)
    assert min(accept_all([first, second]).values()) > 10
    for one in (*connections, first, second, silent):
        one.close()
    address.close()


@pytest.mark.parametrize("listens", [True, False])
def test_no_second_server_gets_the_port(listens: bool) -> None:
    address = SharedAddress(("127.0.0.1", 0))
    one = address.open()
    if listens:
        one.listen()
    port = one.getsockname()[1]
    for num_frontends in (1, 2):
        config = ServerConfig(endpoint="", http=f"127.0.0.1:{port}", num_frontends=num_frontends)
        with pytest.raises(ConfigError, match="cannot listen on http"):
            open_addresses(config, "/nowhere")
    one.close()
    address.close()
    opened = open_addresses(ServerConfig(endpoint="", http=f"127.0.0.1:{port}"), "/nowhere")
    assert list(opened) == ["http"]
    opened["http"].close()


def test_all_processes_accept_from_one_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))  # a killed server leaves it
    config = ServerConfig(endpoint=f"ipc://{path}", num_frontends=2)
    address = open_addresses(config, "/nowhere")["frontend"]
    first, second = address.open(), address.open()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert accept_all([second, first]) == {0: 1}
    for one in (first, second, address):
        one.close()


def test_a_file_of_another_kind_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="no socket"):
        open_addresses(ServerConfig(endpoint=f"ipc://{path}", num_frontends=2), "/nowhere")
    assert os.path.exists(path)


@pytest.mark.parametrize("count", [0, -1, 65])
def test_numbers_of_frontends_that_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="num_frontends must be from 1"):
        ServerConfig(num_frontends=count)
