"""Checks the address of the HTTP server, and sets the options of its sockets."""

import importlib.util
import ipaddress
import socket

from loraplex.engine.config import ServerConfig
from loraplex.engine.errors import ConfigError

PACKAGES = ("starlette", "uvicorn", "httptools", "uvloop", "pydantic", "prometheus_client")
BACKLOG = 2048  # connections that the kernel keeps until the server accepts them
UNREAD_TIMEOUT_MS = 60_000
KEEPALIVE = (
    (socket.TCP_KEEPIDLE, 15),  # seconds
    (socket.TCP_KEEPINTVL, 5),
    (socket.TCP_KEEPCNT, 3),
)


def parse_http_address(address: str) -> tuple[str, int]:
    """Returns host and port of "HOST:PORT".

    Raises:
        ConfigError: the text has another form.
    """
    host, separator, port = address.removeprefix("http://").rpartition(":")
    if not (separator and host and port.isdecimal() and int(port) < 65536):
        raise ConfigError(f"http must be HOST:PORT, as in 127.0.0.1:8000, got {address!r}")
    return host.strip("[]"), int(port)


def check_http_config(config: ServerConfig) -> None:
    """Raises ConfigError if the HTTP server must not or cannot run as configured."""
    if not config.http:
        return
    host, _ = parse_http_address(config.http)
    if not _is_loopback(host) and not config.insecure:
        lack = "encryption, which keys need" if config.api_keys else "encryption or keys"
        raise ConfigError(
            f"http {config.http} is reachable from other machines, without {lack}: "
            "bind 127.0.0.1 behind a proxy that has them, or pass --insecure"
        )
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the HTTP server needs {', '.join(missing)}: pip install 'loraplex[http]'"
        )


def set_http_options(listener: socket.socket) -> None:
    """Makes a socket end connections whose peer is gone or never reads, and makes it listen.

    Accepted connections inherit the options: the kernel drops one whose peer has not taken data for
    UNREAD_TIMEOUT_MS, and probes silent ones.
    """
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_TIMEOUT_MS)
    for option, value in KEEPALIVE:
        listener.setsockopt(socket.IPPROTO_TCP, option, value)
    listener.listen(BACKLOG)


def http_endpoint(listener: socket.socket) -> str:
    """Returns the address of a listening socket as HOST:PORT."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
