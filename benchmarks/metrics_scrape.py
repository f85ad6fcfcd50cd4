"""Measures a scrape of /metrics of a server that knows thousands of adapters.

A small random model runs on the CPU. All adapters are in host memory, and as many as the slots
allow in pages. Scrapes are made while the engine is idle, and while streams run.

    python benchmarks/metrics_scrape.py --out benchmarks/results/metrics_scrape_cpu.jsonl
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from loraplex import Client, SamplingParams
from loraplex.engine.config import AdapterConfig, EngineConfig, ModelConfig, ServerConfig
from loraplex.engine.processes.engine import Engine
from loraplex.entrypoints.bench import dummy
from loraplex.entrypoints.bench.names import MODELS
from loraplex.entrypoints.bench.results import Results
from loraplex.entrypoints.http.routes.metrics_routes import FRESH_S
from loraplex.memory.config import MemoryConfig

SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "max_position_embeddings": 2048,
}  # fmt: skip


def model_folder(folder: Path) -> dict[str, Any]:
    """Write the model without weights; returns its configuration."""
    config = dummy.model_config(next(iter(MODELS))) | SHAPE
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return config


def scrape(url: str) -> tuple[float, int]:
    """Returns seconds and bytes of a scrape that is no copy of the last one."""
    time.sleep(FRESH_S)
    start = time.monotonic()
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as response:
        size = len(response.read())
    return time.monotonic() - start, size


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def measure(engine: Engine, rounds: int) -> dict[str, Any]:
    url = f"http://{engine.http_endpoint}"
    scrape(url)
    processes = {name: psutil.Process(engine.pids[name]) for name in ("http 0", "scheduler")}
    before = {name: cpu_seconds(process) for name, process in processes.items()}
    found = [scrape(url) for _ in range(rounds)]
    cpu_ms = {
        f"cpu_ms, {name}": round(1e3 * (cpu_seconds(process) - before[name]) / rounds, 1)
        for name, process in processes.items()
    }
    times = sorted(1e3 * seconds for seconds, _ in found)
    return {
        "scrapes": rounds,
        "median_ms": round(statistics.median(times), 1),
        "longest_ms": round(times[-1], 1),
        "kilobytes": round(max(size for _, size in found) / 1e3),
        **cpu_ms,  # a scrape; in it what else the processes did
    }


def keep_busy(endpoint: str, num_streams: int, stopped: threading.Event) -> None:
    """Let streams of the base model run until `stopped` is set."""
    with Client(endpoint) as client:
        while not stopped.is_set():
            for number in range(num_streams):
                client.submit([number + 1], SamplingParams(max_tokens=200, ignore_eos=True))
            for _ in range(num_streams):
                client.poll(60.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=2000)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = Results(args.out, None, lambda rows: [])
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        shape = model_folder(root / "model")
        writer = dummy.AdapterWriter(shape, ranks=(4,), modules=("q", "v"))
        config = EngineConfig(
            model=ModelConfig(
                model=str(root / "model"), device="cpu", load_format="dummy",
                skip_tokenizer_init=True,
            ),
            adapter=AdapterConfig(adapter_root=str(root)),
            memory=MemoryConfig(num_pages=8000),
            server=ServerConfig(endpoint="", http="127.0.0.1:0", served_model_name="base"),
        )  # fmt: skip
        with Engine(config) as engine:
            engine.start()
            with Client(engine.endpoint) as client:
                for number in range(args.adapters):
                    adapter = f"customer-{number:05}"
                    client.load_adapter(adapter, str(writer.write(root / adapter, number)))
                    client.submit([1, 2, 3], SamplingParams(max_tokens=1), adapter=adapter)
                    client.poll(60.0)
                stats = client.stats()
            setup = {
                "adapters": stats["registered_adapters"],
                "in_pages": stats["num_resident_adapters"],
                "machine": "2-core CPU machine, shared", "python": platform.python_version(),
            }  # fmt: skip
            for num_streams in (0, args.streams):
                stopped = threading.Event()
                thread = threading.Thread(
                    target=keep_busy, args=(engine.endpoint, num_streams, stopped)
                )
                if num_streams:
                    thread.start()
                row = {"streams": num_streams, **measure(engine, args.rounds), **setup}
                row["load"] = round(os.getloadavg()[0], 1)
                stopped.set()
                if num_streams:
                    thread.join()
                print(row)
                results.write(row)


if __name__ == "__main__":
    main()
