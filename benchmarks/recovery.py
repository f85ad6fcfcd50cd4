"""How fast does a server recover when one of its processes is killed?

`loraplex serve` with the packaged SmolLM2 and its demo adapters, over ZeroMQ and HTTP. Four clients
stream, two over each. One process gets kill -9. Prints a JSON line for each process: seconds until
the last client that lost its stream knows it (`last_error_s`), until the next request has its first
token (`answered_s`, of a process that is started again) or nothing is left of the server
(`gone_s`), and the seconds of the server's start (`start_s`). An adapter reader runs only beside a
GPU, so it is measured alone: `answered_s` is the time of a read whose reader was killed before it,
`start_s` that of the first read. `load` is the machine's load average of the last minute.

    python -P benchmarks/recovery.py --machine "2-core CPU machine" >> recovery_cpu.jsonl
"""

import argparse
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from loraplex import Client, SamplingParams
from loraplex.engine.adapters.reader import ProcessReader, ReaderError
from loraplex.engine.adapters.target import AdapterTarget
from loraplex.engine.errors import LoraplexError
from loraplex.engine.model.shard import whole_modules
from loraplex.memory.adapter_layout import ModuleShape
from loraplex.memory.host.slab import shared_slab
from loraplex.memory.host.store import HostStore

ADAPTERS = Path(__file__).resolve().parents[1] / "examples" / "adapters"
SERVE = [
    sys.executable, "-P", "-m", "loraplex.entrypoints.cli.main", "serve", "--device", "cpu",
    "--adapter-dir", str(ADAPTERS), "--num-pages", "400", "--max-model-len", "1024",
    "--endpoint", "tcp://127.0.0.1:0", "--http", "127.0.0.1:0",
]  # fmt: skip
MODULES = {
    "frontend": "processes.frontend_main",
    "http server": "http.main",
    "scheduler": "processes.scheduler_main",
    "worker": "processes.worker_main",
    "supervisor": "",
}
READER = "adapter reader"
RESTARTED = ("frontend", "http server")
PROMPT = [{"role": "user", "content": "Tell me a story of the sea."}]
LONG, SHORT = 900, 1


class Server:
    """A running server. `start_s` is the time until it was ready."""

    def __init__(self) -> None:
        began = time.monotonic()
        self.process = subprocess.Popen(
            SERVE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        said = ""
        assert self.process.stdout is not None
        while "Ctrl-C stops it" not in said:
            line = self.process.stdout.readline()
            assert line, "the server did not start"
            said += line
        self.start_s = time.monotonic() - began
        self.endpoint = re.findall(r"ready on (\S+)", said)[0]
        self.http = re.findall(r"http://([^/\s]+)/v1", said)[0]
        self.children = psutil.Process(self.process.pid).children(recursive=True)

    def find(self, name: str) -> psutil.Process:
        if not MODULES[name]:
            return psutil.Process(self.process.pid)
        (found,) = [c for c in self.children if MODULES[name] in " ".join(c.cmdline())]
        return found

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()
        psutil.wait_procs(self.children)


def ask_zmq(endpoint: str, num_tokens: int, on_token: Any = None) -> None:
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    with Client(endpoint) as client:
        for _ in client.chat(PROMPT, params, adapter="pirate"):
            if on_token is not None:
                on_token()


def ask_http(address: str, num_tokens: int, on_token: Any = None) -> None:
    """Raises OSError or HTTPException if the stream does not end whole."""
    body = {
        "model": "pirate", "messages": PROMPT, "max_tokens": num_tokens, "ignore_eos": True,
        "stream": True,
    }  # fmt: skip
    connection = http.client.HTTPConnection(address)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response, line = connection.getresponse(), b""
    while line.strip() != b"data: [DONE]":
        line = response.readline()
        if not line or b'"error"' in line:
            raise http.client.IncompleteRead(line)
        if on_token is not None:
            on_token()


class Stream:
    """A client in a thread. `failed_at` is when it lost its stream, 0.0 if it did not."""

    def __init__(self, ask: Any, address: str) -> None:
        self.failed_at = 0.0
        self.begun = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(ask, address), daemon=True)
        self.thread.start()

    def _run(self, ask: Any, address: str) -> None:
        try:
            ask(address, LONG, self.begun.set)
        except (LoraplexError, OSError, http.client.HTTPException):
            self.failed_at = time.monotonic()


def measure(name: str) -> dict[str, Any]:
    server = Server()
    try:
        streams = {
            "frontend": [Stream(ask_zmq, server.endpoint) for _ in range(2)],
            "http server": [Stream(ask_http, server.http) for _ in range(2)],
        }
        for stream in [*streams["frontend"], *streams["http server"]]:
            stream.begun.wait()
        losers = streams.get(name, [*streams["frontend"], *streams["http server"]])
        began = time.monotonic()
        server.find(name).kill()
        for stream in losers:
            stream.thread.join()
        row: dict[str, Any] = {"last_error_s": max(s.failed_at for s in losers) - began}
        if name in RESTARTED:
            _ask_until_answered(name, server)
            row["answered_s"] = time.monotonic() - began
        else:
            psutil.wait_procs(server.children)
            row["gone_s"] = time.monotonic() - began
        row["start_s"] = server.start_s
        return {key: round(value, 2) for key, value in row.items()}
    finally:
        server.stop()


def _ask_until_answered(name: str, server: Server) -> None:
    if name == "frontend":
        return ask_zmq(server.endpoint, SHORT)
    while True:
        try:
            return ask_http(server.http, SHORT)
        except (OSError, http.client.HTTPException):
            time.sleep(0.01)  # nothing listens


def measure_reader() -> dict[str, Any]:
    shapes = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
    modules = whole_modules(tuple(ModuleShape(*shape) for shape in shapes))
    target = AdapterTarget(30, modules, page_elems=16 << 10, dtype=torch.bfloat16, max_rank=64)
    reader, times = ProcessReader(target), []
    for _ in range(2):
        began = time.monotonic()
        if reader.pid is not None:
            os.kill(reader.pid, signal.SIGKILL)
        _read_as_a_worker(reader)
        times.append(round(time.monotonic() - began, 2))
    reader.close()
    return {"answered_s": times[1], "start_s": times[0]}


def _read_as_a_worker(reader: ProcessReader) -> None:
    """Repeats the read after 0.1 s if its process dies."""
    store = HostStore(1 << 30, make_slab=partial(shared_slab, page_locked=False))
    while True:
        try:
            store.add(lambda allocate: reader.read("pirate", ADAPTERS / "pirate", allocate))
            return
        except ReaderError:
            time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machine", required=True, help="its description")
    parser.add_argument("--only", choices=(*MODULES, READER), help="one process")
    options = parser.parse_args()
    for name in [options.only] if options.only else (*MODULES, READER):
        row = measure_reader() if name == READER else measure(name)
        head = {"bench": "recovery", "machine": options.machine, "load": os.getloadavg()[0]}
        model = "SmolLM2-135M-Instruct"
        print(json.dumps({**head, "model": model, "process": name, **row}), flush=True)


if __name__ == "__main__":
    main()
