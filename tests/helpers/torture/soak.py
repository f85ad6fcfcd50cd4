"""Hours of ordinary traffic in minutes: does memory stay flat, and every answer right?

    PYTHONPATH=tests python -m helpers.torture.soak --seconds 600

A server of a small model. Clients stream, cancel and connect anew. Their adapters compete for four
slots with others that are loaded, pinned, replaced and unloaded. Greedy answers are compared with
each client's first one. Prints a JSON line.
"""

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from loraplex.engine.errors import AdapterError, LoraplexError
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.engine.processes.engine import Engine
from loraplex.entrypoints.client.sync_client import Client
from loraplex.memory.config import MemoryConfig

from helpers.torture.cpu_times import CpuTimes
from helpers.torture.run import make_config, memory_of, quantiles

NUM_CLIENTS = 12
LOOK_S = 10.0
WARM_UP = 0.2  # of the time: caches fill until then
RECONNECT = 0.02  # chance that a client begins anew
CANCEL = 0.1


@dataclass
class Soak:
    """The figures of the clients, and the memory of each process over time, in MiB."""

    latencies: list[tuple[float, float]] = field(default_factory=list)  # end, seconds
    wrong: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    memory: list[dict[str, int]] = field(default_factory=list)

    def summary(self, seconds: float) -> dict[str, object]:
        first = [s for at, s in self.latencies if at < 0.2 * seconds]
        last = [s for at, s in self.latencies if at >= 0.8 * seconds]
        warm = self.memory[int(WARM_UP * len(self.memory))]
        return {
            "seconds": seconds, "counts": dict(self.counts), "wrong": len(self.wrong),
            "first_fifth_s": quantiles(first), "last_fifth_s": quantiles(last),
            "warm_mib": warm, "end_mib": self.memory[-1],
            "peak_mib": {name: max(m[name] for m in self.memory) for name in warm},
        }  # fmt: skip


def talk(endpoint: str, number: int, soak: Soak, began: float, end: float) -> None:
    """Be one client until `end`. Times are of the monotonic clock."""
    rng, known = random.Random(number), dict[tuple[str, int], list[int]]()
    client = Client(endpoint, timeout_s=120.0)
    while time.monotonic() < end:
        if rng.random() < RECONNECT:
            client.close()
            client = Client(endpoint, timeout_s=120.0)
            soak.counts["reconnects"] += 1
        adapter, length = rng.choice(["", "a", "b"]), rng.choice([3, 20, 90])
        prompt = {"prompt_token_ids": [5 + number, *range(40, 40 + length)]}
        params = SamplingParams(temperature=0.0, max_tokens=rng.choice([2, 12]), ignore_eos=True)
        cancels, token_ids, start = rng.random() < CANCEL, list[int](), time.monotonic()
        for output in client.generate(prompt, params, adapter=adapter or None):
            token_ids = list(output.outputs[0].token_ids)
            if cancels:
                break
        soak.counts["cancelled" if cancels else "answers"] += 1
        if not cancels:
            soak.latencies.append((time.monotonic() - began, time.monotonic() - start))
        first = known.setdefault((adapter, length), token_ids)
        shorter = min(len(first), len(token_ids))
        if first[:shorter] != token_ids[:shorter]:
            soak.wrong.append(f"{adapter!r}, {length}: {token_ids}, not {first}")
        known[adapter, length] = max(first, token_ids, key=len)
    client.close()


def change_adapters(endpoint: str, folder: Path, soak: Soak, end: float) -> None:
    """Load, pin, replace and unload adapters, and use each."""
    rng = random.Random(0)
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    with Client(endpoint, timeout_s=120.0) as client:
        while time.monotonic() < end:
            name = f"x{rng.randrange(40)}"
            client.load_adapter(name, str(folder / rng.choice("ab")))
            for _ in client.generate({"prompt_token_ids": [7, 8, 9]}, params, adapter=name):
                pass
            try:
                client.pin_adapter(name)
                client.unpin_adapter(name)
            except AdapterError:
                soak.counts["pins refused"] += 1  # others hold the slots
            if rng.random() < 0.5:
                client.unload_adapter(name)
            soak.counts["adapter loads"] += 1


def run(folder: Path, seconds: float) -> tuple[Soak, dict[str, float]]:
    """Returns what was seen, and the CPU seconds of each process."""
    config = make_config(folder)
    config = replace(config, memory=MemoryConfig(num_pages=1500, max_adapter_slots=4))
    engine, soak = Engine(config), Soak()
    engine.start()
    try:
        began = time.monotonic()
        end, cpu = began + seconds, CpuTimes(engine)

        def guard(target: Callable[..., None], *arguments: object) -> None:
            try:
                target(*arguments)
            except LoraplexError as error:
                soak.wrong.append(f"{type(error).__name__}: {error}")

        threads = [
            threading.Thread(target=guard, args=(talk, engine.endpoint, number, soak, began, end))
            for number in range(NUM_CLIENTS)
        ]
        threads.append(
            threading.Thread(
                target=guard, args=(change_adapters, engine.endpoint, folder, soak, end)
            )
        )
        for thread in threads:
            thread.start()
        while time.monotonic() < end:
            time.sleep(min(LOOK_S, seconds / 10))
            soak.memory.append({name: size >> 20 for name, size in memory_of(engine).items()})
        for thread in threads:
            thread.join()
        cpu.look()
        return soak, cpu.since_start()
    finally:
        engine.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak, cpu_s = run(Path(folder), options.seconds)
    print(json.dumps({"bench": "soak", **soak.summary(options.seconds), "cpu_s": cpu_s}))
    print(*soak.wrong[:10], sep="\n", file=sys.stderr)
    return int(bool(soak.wrong))


if __name__ == "__main__":
    sys.exit(main())
