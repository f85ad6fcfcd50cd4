"""Fifty streams of a real model run when SIGTERM comes: all of them end complete."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Semaphore

import pytest

from loraplex import Client, SamplingParams

from helpers.running.http_server import make_models
from helpers.serving.served_command import COMMAND, HttpStream, serving

pytestmark = pytest.mark.e2e
NUM_STREAMS = 50
MAX_TOKENS = 120
ADAPTERS = ("", "a", "b")


def prompt_of(index: int) -> list[int]:
    return [5 + index, 6, 7]


def body_of(index: int) -> dict[str, object]:
    return {
        "model": ADAPTERS[index % 3] or "tiny", "prompt": prompt_of(index), "temperature": 0,
        "max_tokens": MAX_TOKENS, "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip


def stream_over_zmq(endpoint: str, index: int, begun: Semaphore) -> tuple[int, str | None]:
    """Returns the number of tokens and the finish reason."""
    params = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, temperature=0.0)
    with Client(endpoint) as client:
        answer = client.generate(prompt_of(index), params, adapter=ADAPTERS[index % 3])
        next(answer)
        begun.release()
        *_, last = answer
    return len(last.outputs[0].token_ids), last.outputs[0].finish_reason


def test_all_streams_end_complete(tmp_path: Path) -> None:
    make_models(tmp_path)
    options = (
        "--model", str(tmp_path / "base"), "--served-model-name", "tiny", "--device", "cpu",
        "--num-pages", "900", "--block-tokens", "16", "--max-num-seqs", "64",
        "--adapter", f"a={tmp_path / 'a'}", "--adapter", f"b={tmp_path / 'b'}",
        "--num-frontends", "2", "--drain-timeout", "500",
    )  # fmt: skip
    begun = Semaphore(0)
    with serving(*options, command=COMMAND) as server, ThreadPoolExecutor(NUM_STREAMS) as pool:
        half = NUM_STREAMS // 2
        over_zmq = [pool.submit(stream_over_zmq, server.endpoint, i, begun) for i in range(half)]
        over_http = [HttpStream(server.http, body_of(i)) for i in range(half, NUM_STREAMS)]
        for _ in over_zmq:
            begun.acquire()
        for stream in over_http:
            stream.begun.wait()
        assert not all(answer.done() for answer in over_zmq), "the test signals too late"
        server.signal()
        assert {answer.result() for answer in over_zmq} == {(MAX_TOKENS, "length")}
        for stream in over_http:
            tokens = [token for choice in stream.join().choices for token in choice["token_ids"]]
            assert (len(tokens), stream.finish_reason, stream.failure) == (MAX_TOKENS, "length", "")
        assert server.wait()[0] == 0
