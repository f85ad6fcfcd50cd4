"""Opens the socket that clients connect to: address, encryption, limits."""

import contextlib
import errno
import ipaddress
import os
import socket as os_socket
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgpack
import zmq
import zmq.auth

from loraplex.engine.config import ServerConfig
from loraplex.engine.errors import ConfigError
from loraplex.engine.frontend.protocol import MAX_ID_CHARS, error_reply
from loraplex.engine.ipc.channel import PeerGoneError, SlowPeerError, open_socket

if TYPE_CHECKING:
    from zmq.auth.thread import ThreadAuthenticator

TURN_S = 0.01
ADMIN = "admin"  # admin.key among the clients' keys is the operator's
MAX_IPC_PATH = 107  # bytes that Linux allows for the path of a Unix socket
IDENTITY_REFUSED = error_reply(
    "",
    "identity_refused",
    "connect without a ZeroMQ identity (ZMQ_ROUTING_ID): the server numbers its clients itself, "
    "so that none can take the name of another",
)
PING = cast(bytes, msgpack.packb({"type": "ping"}))
SEND_SLOTS = 1024  # messages that the socket keeps for one client; ClientTable keeps the others
SLOT_BYTES = 16 << 10
MAX_UNREAD_BYTES = 64 << 20  # received of one client and not handled
KEEPALIVE_S = 2
LINGER_MS = 1000  # time for the last errors of a dying engine to reach the clients


def check_server_config(config: ServerConfig) -> None:
    """Raises ConfigError if the server must not or cannot listen as configured."""
    scheme, separator, address = config.endpoint.partition("://")
    if config.endpoint == "":
        return
    if not separator or scheme not in ("tcp", "ipc"):
        raise ConfigError(f"endpoint must be tcp://HOST:PORT or ipc://PATH, got {config.endpoint}")
    if scheme == "ipc":
        _check_ipc_path(address)
        return
    host, separator, port = address.rpartition(":")
    if not separator or not (port in ("*", "0") or (port.isdecimal() and int(port) < 65536)):
        raise ConfigError(f"endpoint {config.endpoint} needs a port, as in tcp://127.0.0.1:5599")
    if not _is_loopback(host) and not config.server_secret_key_file and not config.insecure:
        raise ConfigError(
            f"endpoint {config.endpoint} is reachable from other machines: give "
            "--server-secret-key-file (CurveZMQ), bind 127.0.0.1, or pass --insecure"
        )
    for path in (config.server_secret_key_file, config.client_public_keys_dir):
        if path and not os.path.exists(path):
            raise ConfigError(
                f"{path} does not exist: create the keys, see docs/reference/protocol.md"
            )
    if config.client_public_keys_dir and not config.server_secret_key_file:
        raise ConfigError(
            "client_public_keys_dir needs server_secret_key_file: give both, or neither"
        )
    _check_port_is_free(config.endpoint, host.strip("[]"), port)


def _check_port_is_free(endpoint: str, host: str, port: str) -> None:
    """Refuses the port of a server that runs, before the model is loaded.

    Other errors are left to libzmq, and so are IPv6 and the names of hosts and interfaces.
    """
    host = {"*": "0.0.0.0", "localhost": "127.0.0.1"}.get(host, host)
    try:
        ipaddress.IPv4Address(host)
        with os_socket.socket() as probe:
            probe.setsockopt(os_socket.SOL_SOCKET, os_socket.SO_REUSEADDR, 1)
            probe.bind((host, 0 if port == "*" else int(port)))
    except ValueError:
        return
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"cannot listen on {endpoint}: another server runs there; stop it, or choose "
                "another port with --endpoint"
            ) from None


def _is_loopback(host: str) -> bool:
    if host in ("localhost", "lo"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False  # "*" or the name of an interface


def _check_ipc_path(path: str) -> None:
    if len(os.fsencode(path)) > MAX_IPC_PATH:
        raise ConfigError(
            f"the path of ipc://{path} is longer than {MAX_IPC_PATH} bytes: choose a shorter one"
        )
    if os.path.lexists(path):
        check_replaceable(path)
        with os_socket.socket(os_socket.AF_UNIX) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                return  # a killed server left the file; binding replaces it
            except OSError as error:
                raise ConfigError(f"ipc://{path} cannot be used: {error}") from None
        raise ConfigError(f"ipc://{path} is in use by another server: stop it or choose a path")


def check_replaceable(path: str) -> None:
    """Raises ConfigError unless `path` is a socket or missing: binding deletes what is there."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"ipc://{path} cannot be used: {error}") from None
    if not stat.S_ISSOCK(mode):
        raise ConfigError(
            f"ipc://{path} is no socket but a file of another kind, which binding would delete: "
            "choose another path, or remove it yourself"
        )


def check_client_keys(config: ServerConfig) -> None:
    """Raises ConfigError unless the clients' CurveZMQ keys, if any, can be read."""
    if config.client_public_keys_dir:
        read_tenants(config.client_public_keys_dir)


class ClientSocket:
    """Wraps the frontend's ROUTER socket, which receives raw frames and sends maps.

    Attributes:
        endpoint: the address that the socket is bound to, with the port that the system chose.
    """

    def __init__(
        self,
        context: "zmq.Context[Any]",
        config: ServerConfig,
        endpoint: str,
        *,
        listener_fd: int = -1,
    ) -> None:
        """Binds to the configured endpoint, or to `endpoint` if that is empty.

        Args:
            listener_fd: a listening socket with this address, to accept from; -1: make one.

        Raises:
            ConfigError: the address or a key file cannot be used.
        """
        wanted = (config.endpoint or endpoint).replace("tcp://localhost:", "tcp://127.0.0.1:")
        self._authenticator: ThreadAuthenticator | None = None
        self._keys_dir = config.client_public_keys_dir
        self._tenants: dict[str, str] | None = None  # by public key; None: nobody is told apart
        self._max_fillers = min(SEND_SLOTS, config.max_client_backlog) // 4
        self.socket = open_socket(
            context,
            zmq.ROUTER,
            hwm=min(SEND_SLOTS, config.max_client_backlog),
            receive_hwm=max(1, MAX_UNREAD_BYTES // config.max_message_bytes),
            max_message_bytes=config.max_message_bytes,
            linger_ms=LINGER_MS,
        )
        self._notice_vanished_machines()
        if config.server_secret_key_file:
            self._set_up_curve(context, config)
        if wanted.startswith("ipc://"):
            check_replaceable(wanted.removeprefix("ipc://"))
        if listener_fd >= 0:
            self.socket.setsockopt(zmq.USE_FD, listener_fd)
        try:
            self.socket.bind(wanted)
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot listen on {wanted}: {error}") from None
        self.endpoint = cast(bytes, self.socket.get(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()

    def _notice_vanished_machines(self) -> None:
        """Let the kernel probe silent connections: it gives up on one after some eight seconds.

        Not libzmq's heartbeats: version 4.3.5 aborts the process if one is due for a client that
        has left while its messages wait to be read (libzmq issues 3937, 4364 and 4841). Clients may
        use heartbeats: if one announces a TTL, libzmq drops it after that time of silence.
        """
        self.socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        self.socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, KEEPALIVE_S)
        self.socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, KEEPALIVE_S)
        self.socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)

    def _set_up_curve(self, context: "zmq.Context[Any]", config: ServerConfig) -> None:
        try:
            public, secret = zmq.auth.load_certificate(config.server_secret_key_file)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{config.server_secret_key_file}: {error}") from None
        if secret is None:
            raise ConfigError(
                f"{config.server_secret_key_file} holds no secret key: name the file that ends in "
                ".key_secret"
            )
        from zmq.auth.thread import ThreadAuthenticator  # loads asyncio

        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        if self._keys_dir:
            self.read_keys()
        else:
            self._authenticator.configure_curve(domain="*", location=zmq.auth.CURVE_ALLOW_ANY)
        self.socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
        self.socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        self.socket.setsockopt(zmq.CURVE_SERVER, 1)

    def read_keys(self) -> None:
        """Reads the clients' keys, if the server asks for known ones.

        Connections stay. The tenant of one whose key is gone is None from now on.

        Raises:
            ConfigError: the files are not as they must be; nothing has changed.
        """
        if self._keys_dir and self._authenticator is not None:
            self._tenants = read_tenants(self._keys_dir)
            self._authenticator.configure_curve(domain="*", location=self._keys_dir)

    def send(self, client: bytes, data: bytes) -> None:
        """Sends an encoded message to a client without waiting.

        A socket counts messages, not bytes. So a large one takes several places of the client's
        queue: "ping" messages, which clients ignore, fill the others.

        Raises:
            PeerGoneError: the client has left.
            SlowPeerError: the client does not read.
        """
        try:
            for _ in range(min(len(data) // SLOT_BYTES, self._max_fillers)):
                self.socket.send_multipart((client, PING), zmq.DONTWAIT)
            self.socket.send_multipart((client, data), zmq.DONTWAIT)
        except zmq.Again:
            raise SlowPeerError("too many unread messages") from None
        except zmq.ZMQError as error:
            raise PeerGoneError(str(error)) from None

    def receive(self, handle: Callable[[bytes, Sequence[memoryview], str | None], None]) -> None:
        """Calls handle(client, frames, tenant) for each message that has arrived, without waiting.

        The frames lie where libzmq has put them: copying 15 MiB takes longer than refusing them.

        The tenant is empty for the operator, who holds the key ADMIN, and where the server does not
        ask for known keys. It is None for a client whose key is not known any more. Refuses the
        messages of clients that chose a ZeroMQ identity. Returns after TURN_S at the latest, so
        that outputs are not delayed by new requests.
        """
        end = time.monotonic() + TURN_S
        while time.monotonic() < end:
            try:
                routing_id, *frames = self.socket.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return
            if all(map(_is_anonymous, frames)):
                tenant = self._tenant_of(frames[-1])
                handle(routing_id.bytes, [frame.buffer for frame in frames], tenant)
            else:
                self._refuse(routing_id.bytes)

    def _tenant_of(self, frame: zmq.Frame) -> str | None:
        if self._tenants is None:
            return ""
        return self._tenants.get(_property(frame, "User-Id"))  # the authenticator has set it

    def _refuse(self, client: bytes) -> None:
        with contextlib.suppress(PeerGoneError):
            self.send(client, msgpack.packb(IDENTITY_REFUSED))

    def close(self) -> None:
        """Closes the socket. Destroying the context waits up to LINGER_MS for unsent messages."""
        self.socket.close()
        if self._authenticator is not None:
            self._authenticator.stop()


def read_tenants(folder: str) -> dict[str, str]:
    """Returns the tenant by public key (Z85): the name of the key's file without its ending.

    The tenant of ADMIN is the empty text.

    Raises:
        ConfigError: two files hold one key, or a file's name cannot be a tenant's.
    """
    tenants: dict[str, str] = {}
    for path in sorted(Path(folder).glob("[!.]*.key")):
        tenant = "" if path.stem == ADMIN else path.stem
        if not path.stem.isprintable() or len(path.stem) > MAX_ID_CHARS:
            raise ConfigError(f"{path}: the name of a client's key must be printable: rename it")
        try:
            key = zmq.auth.load_certificate(path)[0].decode()
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is not a CurveZMQ certificate: {error}") from None
        if key in tenants:
            raise ConfigError(f"{path} holds the key of another file in {folder}: remove one")
        tenants[key] = tenant
    return tenants


def _is_anonymous(frame: zmq.Frame) -> bool:
    """Tells whether the sender left it to this socket to number it.

    Protocols older than ZMTP 3 carry no properties. Their clients could hide an identity.
    """
    return bool(_property(frame, "Socket-Type")) and not _property(frame, "Identity")


def _property(frame: zmq.Frame, name: str) -> str:
    """Returns what the sender said in the handshake, "" if it said nothing."""
    try:
        return str(frame.get(name))
    except UnicodeDecodeError:
        return "?"
    except zmq.ZMQError:
        return ""
