"""Addresses at which several frontends of one engine listen."""

import os
import socket

from loraplex.engine.config import ServerConfig
from loraplex.engine.errors import ConfigError
from loraplex.engine.frontend.client_socket import check_replaceable
from loraplex.engine.processes.addresses.http_address import parse_http_address, set_http_options

ZMQ_BACKLOG = 100  # libzmq's own


class SharedAddress:
    """Reserves an address, and gives each process a socket that is bound to it.

    With TCP the sockets form a SO_REUSEPORT group: the kernel shares new connections out among
    those that listen, so one whose process has died gets none. With a Unix path all processes
    accept from one listening socket, and whichever is free first gets the connection.

    The supervisor's own TCP socket does not listen. It keeps the port from other servers.
    """

    def __init__(self, address: tuple[str, int] | str) -> None:
        """Reserves host and port, or the path of a Unix socket. Port 0 is one that is free.

        Raises:
            OSError: the address cannot be used.
        """
        self._is_path = isinstance(address, str)
        if isinstance(address, str):
            self._family = socket.AF_UNIX
            _remove_stale(address)
            self._own = _bound(self._family, address)
            self._own.listen(ZMQ_BACKLOG)
        else:
            self._family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
            with _bound(self._family, address, socket.SO_REUSEADDR) as probe:
                address = probe.getsockname()[:2]
            # The probe fails if another server listens. This socket lacks SO_REUSEADDR, so that
            # another server's probe also fails while no process listens yet.
            self._own = _bound(self._family, address, socket.SO_REUSEPORT)
        self._name = self._own.getsockname()

    def open(self) -> socket.socket:
        """Returns a socket for one process. Close it when the process has it.

        A TCP socket does not listen yet: connections would wait until the process is ready.
        """
        if self._is_path:
            return self._own.dup()
        return _bound(self._family, self._name, socket.SO_REUSEADDR, socket.SO_REUSEPORT)

    def close(self) -> None:
        """Frees the address once the processes have ended too. It may be called again."""
        self._own.close()


def open_addresses(config: ServerConfig, run_dir: str) -> dict[str, SharedAddress]:
    """Returns the addresses of frontends by their kind.

    A single ZeroMQ frontend is left out: libzmq binds its address.

    Raises:
        ConfigError: an address cannot be used.
    """
    addresses: dict[str, SharedAddress] = {}
    try:
        if config.http:
            where = f"http {config.http}"
            host, port = parse_http_address(config.http)
            addresses["http"] = SharedAddress(("" if host == "*" else host, port))
        if config.num_frontends > 1:
            where = config.endpoint or f"ipc://{run_dir}/clients"
            shared = SharedAddress(_parse_endpoint(where))
            addresses |= {"frontend": shared, "router": shared}  # an engine's, a cluster's
    except OSError as error:
        for address in addresses.values():
            address.close()
        raise ConfigError(f"cannot listen on {where}: {error}") from None
    return addresses


def inherited_http_listener(descriptor: int) -> socket.socket:
    """Returns the socket of an HTTP frontend, which the supervisor has bound."""
    listener = socket.socket(fileno=descriptor)
    listener.set_inheritable(False)
    set_http_options(listener)
    return listener


def inherited_zmq_listener(descriptor: int) -> int:
    """Makes a socket that the supervisor has bound listen for libzmq, which takes its number."""
    listener = socket.socket(fileno=descriptor)
    listener.set_inheritable(False)
    listener.setblocking(False)  # another frontend may be faster to accept
    listener.listen(ZMQ_BACKLOG)
    return listener.detach()


def _bound(family: int, address: tuple[str, int] | str, *options: int) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        for option in options:
            bound.setsockopt(socket.SOL_SOCKET, option, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def _parse_endpoint(endpoint: str) -> tuple[str, int] | str:
    """Returns host and port of tcp://HOST:PORT, or the path of ipc://PATH."""
    scheme, _, address = endpoint.partition("://")
    if scheme == "ipc":
        return address
    host, _, port = address.rpartition(":")
    return host.strip("[]").replace("*", ""), 0 if port == "*" else int(port)


def _remove_stale(path: str) -> None:
    """Removes the socket that a killed server left. check_server_config() has seen it is free."""
    check_replaceable(path)
    if os.path.lexists(path):
        os.unlink(path)
