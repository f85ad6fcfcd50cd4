"""Measures what a client spends on one long stream: bytes on the wire and CPU time.

    python benchmarks/client/stream.py --out benchmarks/results/client_stream.jsonl

A transport in this process hands the client the messages of docs/reference/protocol.md, one token
each. So the figures cover the client's decoding and assembly, and no engine.
"""

import argparse
import json
import platform
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgpack

from loraplex import Client, SamplingParams

CHARS_PER_TOKEN = 4


class ReplayTransport:
    """A Transport that answers each request with `num_tokens` messages of one token."""

    is_local = True
    max_message_bytes = 0

    def __init__(self, num_tokens: int, num_logprobs: int | None) -> None:
        self._num_tokens = num_tokens
        self._num_logprobs = num_logprobs
        self._frames: deque[bytes] = deque()
        self.num_bytes = 0
        self.num_messages = 0

    def send(self, message: dict[str, Any], frames: Sequence[memoryview] = ()) -> None:
        """Queue the whole answer to a "generate"."""
        if message["type"] != "generate":
            return
        for position in range(self._num_tokens):
            frame = msgpack.packb(self._output(message["request_id"], position))
            self._frames.append(frame)
            self.num_bytes += len(frame)
            self.num_messages += 1

    def receive(self, timeout_s: float | None) -> list[dict[str, Any]]:
        """Decode one message, as a client does that keeps up with the engine."""
        return [msgpack.unpackb(self._frames.popleft(), strict_map_key=False)]

    def is_lost(self) -> bool:
        return False

    def close(self) -> None: ...

    def _output(self, request_id: str, position: int) -> dict[str, Any]:
        finished = position == self._num_tokens - 1
        token_id = 1000 + position
        entry: dict[str, Any] = {
            "index": 0,
            "text": "x" * CHARS_PER_TOKEN,
            "token_ids": [token_id],
            "finish_reason": "length" if finished else None,
            "stop_reason": None,
        }
        if self._num_logprobs is not None:
            candidates = range(self._num_logprobs + 1)
            entry["logprobs"] = [[[token_id + i, -0.5, i + 1, "xxxx"] for i in candidates]]
        reply = {
            "type": "output",
            "request_id": request_id,
            "outputs": [entry],
            "finished": finished,
        }
        if finished:
            reply["usage"] = {"prompt_tokens": 1, "completion_tokens": 1, "cached_tokens": 0}
        return reply


def measure(num_tokens: int, num_logprobs: int | None, reads: str, kind: str) -> dict[str, Any]:
    """Stream one answer; `reads` is the field that the caller reads at each output, or ""."""
    params: dict[str, Any] = {"max_tokens": num_tokens, "logprobs": num_logprobs}
    if kind != "cumulative":
        params["output_kind"] = kind
    transport = ReplayTransport(num_tokens, num_logprobs)
    client = Client(transport)
    stream = client.generate([1], SamplingParams(**params))
    started = time.process_time()
    num_read = 0
    for output in stream:
        if reads:
            num_read += len(getattr(output.outputs[0], reads))
    cpu_ms = (time.process_time() - started) * 1e3
    return {
        "output_kind": kind,
        "num_tokens": num_tokens,
        "num_logprobs": num_logprobs,
        "reads": reads,
        "num_messages": transport.num_messages,
        "wire_bytes": transport.num_bytes,
        "client_cpu_ms": round(cpu_ms, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num-tokens", type=int, default=8000)
    parser.add_argument("--kinds", nargs="+", default=["cumulative", "delta"])
    parser.add_argument("--label", default="", help="kept in each line, for example a commit")
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    args = parser.parse_args()
    setup = {
        "machine": "2-core CPU machine",
        "python": platform.python_version(),
        "label": args.label,
    }
    for kind in args.kinds:
        for num_logprobs in (None, 1):
            for reads in ("", "token_ids", "text"):
                row = min(
                    (measure(args.num_tokens, num_logprobs, reads, kind) for _ in range(5)),
                    key=lambda row: row["client_cpu_ms"],
                )
                print(row, flush=True)
                if args.out is not None:
                    with args.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({**setup, **row}) + "\n")


if __name__ == "__main__":
    main()
