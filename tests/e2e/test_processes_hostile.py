"""Clients that send rubbish, and clients that must not get in."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import psutil
import pytest
import zmq
import zmq.auth

from loraplex.engine.config import ServerConfig
from loraplex.engine.errors import ClientError, ConfigError, EngineDeadError
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.engine.processes.engine import Engine
from loraplex.entrypoints.client.sync_client import Client

from helpers.fakes.fake_engine import expected_tokens, fake_config
from helpers.running.processes import GUARD_S, running_engine, wait_until

pytestmark = pytest.mark.e2e
MAX_BYTES = 1 << 20


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    server = ServerConfig(endpoint="tcp://127.0.0.1:0", max_message_bytes=MAX_BYTES)
    with running_engine(fake_config(server=server)) as engine:
        yield engine


@pytest.fixture
def socket(engine: Engine) -> Iterator[Any]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(engine.endpoint)
        yield socket


def answers(client: Client) -> bool:
    *_, output = client.generate([1, 2], SamplingParams(max_tokens=4, temperature=0.0))
    return output.outputs[0].token_ids == expected_tokens([1, 2], max_tokens=4)


def value(rng: random.Random, depth: int = 0) -> Any:
    """Returns a random value of any type that MessagePack has."""
    kind = rng.randrange(14 if depth < 4 else 9)
    if kind == 9:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind >= 10:
        keys = ["type", "request_id", "prompt", "n", 7, "sampling_params", "messages", "role"]
        return {rng.choice(keys): value(rng, depth + 1) for _ in range(rng.randrange(5))}
    plain = [None, True, -(2**63), 2**64 - 1, 1e308, float("nan"), "x" * rng.randrange(300),
             rng.randbytes(rng.randrange(50)), rng.randrange(-5, 500)]  # fmt: skip
    return plain[kind]


FIELDS = [
    "prompt", "prompt_token_ids", "messages", "sampling_params", "adapter", "salt", "priority",
    "stream", "name", "path", "lazy", "version", "add_generation_prompt", "use_prefix_cache",
]  # fmt: skip
TYPES = [
    "generate", "cancel", "load_adapter", "unload_adapter", "list_adapters", "health", "stats",
    "ping", "bye", "shutdown", "", None, 5,
]  # fmt: skip


def hostile_frames(rng: random.Random) -> list[bytes]:
    kind = rng.randrange(8)
    if kind == 0:
        return [rng.randbytes(rng.randrange(200))]
    if kind == 1:
        return [rng.randbytes(rng.randrange(20)) for _ in range(rng.randrange(2, 6))]
    if kind == 2:
        return [
            rng.choice(
                [
                    b"",
                    b"\xc1",
                    b"\x91" * 2000,
                    b"\xdd\xff\xff\xff\xff",
                    b"\x81" * 600,
                    b"\xdf\xff\xff\xff\xff" * 9,
                    b"\xc6\xff\xff\xff\xff",
                    b"\x00" * 999,
                ]
            )
        ]
    if kind == 3:
        return [msgpack.packb(value(rng))]
    message = {"type": rng.choice(TYPES), "request_id": rng.choice(["a", "b", "c", 5, ""])}
    for _ in range(rng.randrange(4)):
        message[rng.choice(FIELDS)] = value(rng)
    if kind == 4:
        names = ["n", "seed", "top_p", "stop", "max_tokens", "logit_bias", "logprobs"]
        message |= {
            "type": "generate",
            "prompt_token_ids": [1, 2],
            "sampling_params": {rng.choice(names): value(rng) for _ in range(3)},
        }
    frame = bytearray(msgpack.packb(message))
    if kind == 5:
        frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
    if kind == 6:
        frame = frame[: rng.randrange(len(frame))]
    return [bytes(frame)]


@pytest.mark.parametrize("num_frames", [3000, pytest.param(30_000, marks=pytest.mark.long)])
def test_malformed_frames_leave_the_server_answering(
    engine: Engine, socket: Any, num_frames: int
) -> None:
    rng = random.Random(0)
    frontend = psutil.Process(engine.pids["frontend 0"])
    with Client(engine.endpoint) as client:
        memory = frontend.memory_info().rss
        codes: dict[str, int] = {}

        def count_errors(timeout_ms: int) -> None:
            while socket.poll(timeout_ms):
                reply = msgpack.unpackb(socket.recv(), strict_map_key=False)
                if reply["type"] == "error":
                    assert "Traceback" not in reply["message"]
                    codes[reply["code"]] = codes.get(reply["code"], 0) + 1

        for i in range(num_frames):
            socket.send_multipart(hostile_frames(rng))
            count_errors(0)
            if i % 1000 == 0:
                assert answers(client)
        count_errors(1000)
        socket.send(msgpack.packb({"type": "bye"}))
        assert answers(client)
        wait_until(lambda: client.stats()["running"] == 0)
        stats = client.stats()
        assert stats["pages_kv"] == 0
        assert stats["frontend"]["waiting_clients"] <= 1
        assert stats["frontend"]["malformed"] > num_frames // 10
        assert codes["malformed"] > num_frames // 10
        assert codes["bad_request"] > num_frames // 10
        assert "internal" not in codes, codes
        assert frontend.memory_info().rss - memory < 100 << 20
    assert engine.dead_reason is None


def test_an_oversized_message_costs_its_sender_the_connection(engine: Engine, socket: Any) -> None:
    with Client(engine.endpoint) as client:
        huge = {"type": "generate", "request_id": "a", "prompt": "x" * 2 * MAX_BYTES}
        socket.send(msgpack.packb(huge))
        assert answers(client)
        assert socket.poll(300) == 0
        with pytest.raises(ClientError, match="the server takes 1048576") as caught:
            client.submit("x" * 2 * MAX_BYTES)
        assert caught.value.code == "too_large"
        assert answers(client)


def test_bytes_that_are_not_zeromq_at_all(engine: Engine) -> None:
    import socket as plain

    host, port = engine.endpoint.removeprefix("tcp://").split(":")
    rng = random.Random(1)
    with Client(engine.endpoint) as client:
        for _ in range(50):
            with plain.create_connection((host, int(port))) as connection:
                connection.sendall(rng.choice([b"GET / HTTP/1.1\r\n\r\n", rng.randbytes(500), b""]))
        assert answers(client)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys")
    for name in ("server", "friend", "stranger"):
        zmq.auth.create_certificates(str(path), name)
    (path / "friends").mkdir()
    (path / "friend.key").rename(path / "friends" / "friend.key")
    return path


def curve_server(keys: Path, *, friends_only: bool) -> ServerConfig:
    return ServerConfig(
        endpoint="tcp://0.0.0.0:0",
        server_secret_key_file=str(keys / "server.key_secret"),
        client_public_keys_dir=str(keys / "friends") if friends_only else "",
    )


def connect(engine: Engine, **options: Any) -> Client:
    endpoint = engine.endpoint.replace("0.0.0.0", "127.0.0.1")
    return Client(endpoint, **{"timeout_s": GUARD_S, **options})


def check_refused(engine: Engine, **options: Any) -> None:
    """No answer ever comes, so that the time limit may be short on any machine."""
    with pytest.raises(EngineDeadError, match="keys|no answer"):
        connect(engine, timeout_s=1.0, **options)


def test_curve_keys_of_the_server_are_demanded(keys: Path) -> None:
    with running_engine(fake_config(server=curve_server(keys, friends_only=False))) as engine:
        public, _ = zmq.auth.load_certificate(str(keys / "server.key"))
        with connect(engine, server_public_key=public.decode()) as client:
            assert answers(client)
        with connect(engine, server_public_key=str(keys / "server.key")) as client:
            assert answers(client)
        check_refused(engine)  # no encryption
        wrong, _ = zmq.curve_keypair()
        check_refused(engine, server_public_key=wrong.decode())
        with connect(engine, server_public_key=public.decode()) as client:
            assert answers(client)


def test_curve_keys_of_clients_can_be_demanded(keys: Path) -> None:
    with running_engine(fake_config(server=curve_server(keys, friends_only=True))) as engine:
        server_key = str(keys / "server.key")
        friend, stranger = str(keys / "friend.key_secret"), str(keys / "stranger.key_secret")
        with connect(engine, server_public_key=server_key, client_secret_key_file=friend) as client:
            assert answers(client)
        for secret in (stranger, None):
            check_refused(engine, server_public_key=server_key, client_secret_key_file=secret)


def test_keys_that_are_no_keys_are_named(keys: Path) -> None:
    for options, text in [
        ({"server_public_key": "short"}, "40 Z85 characters"),
        ({"client_secret_key_file": "x"}, "needs server_public_key"),
        ({"server_public_key": str(keys / "server.key"), "client_secret_key_file": "/nowhere"},
         "/nowhere is not a CurveZMQ certificate"),
        ({"server_public_key": str(keys / "server.key"),
          "client_secret_key_file": str(keys / "server.key")}, "holds no secret key"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=text):
            Client("tcp://127.0.0.1:1", **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="endpoint must be tcp:"):
        Client("nonsense")
