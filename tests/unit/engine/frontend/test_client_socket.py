import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq
import zmq.auth

from loraplex.engine.config import ServerConfig
from loraplex.engine.errors import ConfigError
from loraplex.engine.frontend.client_socket import ClientSocket, check_server_config, read_tenants


@pytest.fixture
def context() -> Iterator[Any]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.mark.parametrize(
    "endpoint",
    ["", "tcp://127.0.0.1:5599", "tcp://127.8.9.1:0", "tcp://localhost:*", "tcp://[::1]:5599",
     "tcp://lo:5599", "ipc:///tmp/loraplex-test-endpoint"],
)  # fmt: skip
def test_private_addresses_need_no_key(endpoint: str) -> None:
    check_server_config(ServerConfig(endpoint=endpoint))


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "*", "eth0", "192.168.1.5", "[::]", "8.8.8.8", "example.org", ""]
)
def test_public_addresses_need_a_key_or_the_users_word(host: str, tmp_path: Path) -> None:
    endpoint = f"tcp://{host}:5599"
    with pytest.raises(ConfigError, match="--server-secret-key-file.*--insecure"):
        check_server_config(ServerConfig(endpoint=endpoint))
    check_server_config(ServerConfig(endpoint=endpoint, insecure=True))
    key = tmp_path / "key"
    key.touch()
    check_server_config(ServerConfig(endpoint=endpoint, server_secret_key_file=str(key)))


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (ServerConfig(endpoint="5599"), "tcp://HOST:PORT"),
        (ServerConfig(endpoint="http://127.0.0.1:80"), "tcp://HOST:PORT"),
        (ServerConfig(endpoint="inproc://x"), "tcp://HOST:PORT"),
        (ServerConfig(endpoint="tcp://127.0.0.1"), "needs a port"),
        (ServerConfig(endpoint="tcp://127.0.0.1:x"), "needs a port"),
        (ServerConfig(endpoint="tcp://127.0.0.1:99999"), "needs a port"),
        (ServerConfig(endpoint="ipc:///" + "x" * 120), "longer than 107"),
        (ServerConfig(server_secret_key_file="/nowhere"), "/nowhere does not exist"),
        (ServerConfig(client_public_keys_dir="/tmp"), "needs server_secret_key_file"),
    ],
)
def test_what_cannot_work_is_refused(config: ServerConfig, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        check_server_config(config)


def test_the_socket_of_a_living_server_is_not_taken_over(tmp_path: Path) -> None:
    path = str(tmp_path / "live")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        with pytest.raises(ConfigError, match="in use"):
            check_server_config(ServerConfig(endpoint=f"ipc://{path}"))
    check_server_config(ServerConfig(endpoint=f"ipc://{path}"))  # left by a dead one


@pytest.mark.parametrize("kind", ["file", "folder", "pipe", "link", "dangling link"])
def test_only_a_socket_is_ever_replaced(context: Any, tmp_path: Path, kind: str) -> None:
    path, content = tmp_path / "endpoint", tmp_path / "content"
    content.write_text("precious")
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(content if kind == "link" else tmp_path / "nothing")
    before = path.lstat()
    config = ServerConfig(endpoint=f"ipc://{path}")
    with pytest.raises(ConfigError, match="is no socket"):
        check_server_config(config)
    with pytest.raises(ConfigError, match="is no socket"):
        ClientSocket(context, config, "")
    assert path.lstat() == before
    assert content.read_text() == "precious"


def test_a_port_in_use_is_named(context: Any) -> None:
    first = ClientSocket(context, ServerConfig(endpoint="tcp://127.0.0.1:0"), "")
    assert not first.endpoint.endswith(":0")
    with pytest.raises(ConfigError, match=f"cannot listen on {first.endpoint}.*in use"):
        ClientSocket(context, ServerConfig(endpoint=first.endpoint), "")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "*"])
def test_a_port_in_use_is_found_before_anything_is_loaded(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        config = ServerConfig(endpoint=f"tcp://{host}:{port}", insecure=True)
        with pytest.raises(ConfigError, match="another server runs there; stop it, or choose"):
            check_server_config(config)
    check_server_config(config)


def test_a_key_file_without_a_key_is_refused(context: Any, tmp_path: Path) -> None:
    key = tmp_path / "server.key_secret"
    key.write_text("nothing")
    config = ServerConfig(endpoint="tcp://127.0.0.1:0", server_secret_key_file=str(key))
    with pytest.raises(ConfigError, match=str(key)):
        ClientSocket(context, config, "")


@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
def test_a_client_that_chose_its_identity_is_refused(
    context: Any, tmp_path: Path, scheme: str
) -> None:
    endpoint = "tcp://127.0.0.1:0" if scheme == "tcp" else f"ipc://{tmp_path}/s"
    server = ClientSocket(context, ServerConfig(endpoint=endpoint), "")
    chosen, anonymous = context.socket(zmq.DEALER), context.socket(zmq.DEALER)
    chosen.setsockopt(zmq.IDENTITY, b"\xff\x00mine")
    for client in (chosen, anonymous):
        client.connect(server.endpoint)
        client.send(b"hello")
    handled: list[Sequence[memoryview]] = []
    while not chosen.poll(10) or not handled:
        server.receive(lambda client, frames, tenant: handled.append(frames))
    assert handled == [[b"hello"]]
    assert isinstance(handled[0][0], memoryview), "the frame was copied"
    reply = msgpack.unpackb(chosen.recv())
    assert reply["code"] == "identity_refused"
    assert "ZMQ_ROUTING_ID" in reply["message"]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """The server's keys in the folder, and in "allowed" those of three clients."""
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    zmq.auth.create_certificates(tmp_path, "server")
    for name in ("ann", "ben", "admin"):
        zmq.auth.create_certificates(allowed, name)
    return tmp_path


def curve_config(keys: Path, *, knows_clients: bool = True) -> ServerConfig:
    return ServerConfig(
        endpoint="tcp://127.0.0.1:0",
        server_secret_key_file=str(keys / "server.key_secret"),
        client_public_keys_dir=str(keys / "allowed") if knows_clients else "",
    )


def curve_client(context: Any, keys: Path, name: str, endpoint: str) -> Any:
    client = context.socket(zmq.DEALER)
    public, secret = zmq.auth.load_certificate(keys / "allowed" / f"{name}.key_secret")
    client.curve_publickey, client.curve_secretkey = public, secret
    client.curve_serverkey = zmq.auth.load_certificate(keys / "server.key")[0]
    client.connect(endpoint)
    return client


@pytest.mark.parametrize("knows_clients", [True, False])
def test_the_clients_key_says_its_tenant(context: Any, keys: Path, knows_clients: bool) -> None:
    server = ClientSocket(context, curve_config(keys, knows_clients=knows_clients), "")
    for name in ("ann", "ben", "admin"):
        curve_client(context, keys, name, server.endpoint).send(name.encode())
    tenants: dict[bytes, str] = {}
    while len(tenants) < 3:
        server.receive(lambda client, frames, tenant: tenants.update({bytes(frames[0]): tenant}))
    expected = ["ann", "ben", ""] if knows_clients else [""] * 3
    assert [tenants[name] for name in (b"ann", b"ben", b"admin")] == expected
    server.close()


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda folder: (folder / "ann.key").rename(folder / "a\nb.key"), "must be printable"),
        (lambda folder: (folder / "ann.key").write_text("x"), "not a CurveZMQ certificate"),
        (
            lambda folder: (folder / "cid.key").write_bytes((folder / "ann.key").read_bytes()),
            "the key of another file",
        ),
    ],
)
def test_client_keys_that_name_no_tenant_are_refused(
    keys: Path, spoil: Callable[[Path], object], text: str
) -> None:
    assert sorted(read_tenants(str(keys / "allowed")).values()) == ["", "ann", "ben"]
    spoil(keys / "allowed")
    with pytest.raises(ConfigError, match=text):
        read_tenants(str(keys / "allowed"))


FIRST_NUMBER = """
import zmq
from loraplex.engine.ipc.channel import open_socket
context = zmq.Context()
router = open_socket(context, zmq.ROUTER, hwm=9)
port = router.bind_to_random_port("tcp://127.0.0.1")
dealer = open_socket(context, zmq.DEALER, hwm=9)
dealer.connect(f"tcp://127.0.0.1:{port}")
dealer.send(b"x")
print(router.recv_multipart()[0].hex())
context.destroy(linger=0)
"""


def test_no_two_processes_number_their_peers_alike() -> None:
    run = [sys.executable, "-P", "-c", FIRST_NUMBER]
    numbers = {
        subprocess.run(run, capture_output=True, text=True, check=True).stdout for _ in range(2)
    }
    assert len(numbers) == 2
