"""The HTTP server's listening socket."""

import socket

import pytest

from loraplex.engine.errors import ConfigError
from loraplex.engine.processes.addresses.http_address import (
    UNREAD_TIMEOUT_MS,
    parse_http_address,
    set_http_options,
)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("127.0.0.1:8000", ("127.0.0.1", 8000)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:80", ("::1", 80)),
        ("http://127.0.0.1:1", ("127.0.0.1", 1)),
    ],
)
def test_addresses(text: str, want: tuple[str, int]) -> None:
    assert parse_http_address(text) == want


@pytest.mark.parametrize("text", ["8000", ":8000", "host:", "host:x", "host:70000"])
def test_texts_that_are_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match="http must be HOST:PORT"):
        parse_http_address(text)


def test_connections_inherit_the_timeout_of_peers_that_do_not_read() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        set_http_options(listener)
        address = listener.getsockname()
        with socket.create_connection(address), listener.accept()[0] as accepted:
            timeout = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
            assert timeout == UNREAD_TIMEOUT_MS
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
