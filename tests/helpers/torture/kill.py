"""Kills or stops one process of an engine under load, and times what its clients see.

    PYTHONPATH=tests python -m helpers.torture.kill

Two worker ranks without a model. Four clients stream from one frontend. Prints a JSON line for each
signal and process: seconds until the last client has its error, and until a new client is answered
(a frontend) or nothing is left of the engine (the others).
"""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from loraplex.engine.config import ParallelConfig
from loraplex.engine.errors import LoraplexError
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.engine.processes.engine import Engine
from loraplex.entrypoints.client.sync_client import Client

from helpers.fakes.fake_engine import fake_config
from helpers.running.processes import assert_gone, leftovers, make_engine, start_engine

NUM_CLIENTS = 4
LONG, SHORT = SamplingParams(max_tokens=500), SamplingParams(max_tokens=1)
VICTIMS = ("worker 0", "worker 1", "scheduler", "frontend 0")


class Stream:
    """A client in a thread that streams until its request fails."""

    def __init__(self, endpoint: str, number: int) -> None:
        self.failed_at, self.error = 0.0, ""
        self.begun = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(endpoint, number), daemon=True)
        self.thread.start()

    def _run(self, endpoint: str, number: int) -> None:
        client = Client(endpoint)
        try:
            for _ in client.generate([number + 1], LONG):
                self.begun.set()
        except LoraplexError as error:
            self.failed_at, self.error = time.monotonic(), str(error)
        client.close()


@contextmanager
def streaming() -> Iterator[tuple[Engine, list[Stream]]]:
    """Yields an engine with its clients, each of which has had an output."""
    config = fake_config(parallel=ParallelConfig(tensor_parallel_size=2))
    engine = make_engine(config, "--delay", "0.1")
    start_engine(engine)
    try:
        streams = [Stream(engine.endpoint, number) for number in range(NUM_CLIENTS)]
        for stream in streams:
            stream.begun.wait()
        yield engine, streams
    finally:
        engine.stop()


def measure(name: str, number: signal.Signals) -> dict[str, object]:
    with streaming() as (engine, streams):
        left, endpoint = leftovers(engine), engine.endpoint
        began = time.monotonic()
        os.kill(engine.pids[name], number)
        for stream in streams:
            stream.thread.join()
        last = max(stream.failed_at for stream in streams) - began
        if name.startswith("frontend"):
            with Client(endpoint) as client:
                list(client.generate([1], SHORT))
        else:
            assert_gone(left)
        over = time.monotonic() - began
    return {
        "bench": "kill", "process": name, "signal": number.name, "error": streams[0].error,
        "last_error_s": round(last, 2), "over_s": round(over, 2),
    }  # fmt: skip


if __name__ == "__main__":
    for number in (signal.SIGKILL, signal.SIGSTOP):
        for name in VICTIMS:
            print(json.dumps(measure(name, number)), flush=True)
