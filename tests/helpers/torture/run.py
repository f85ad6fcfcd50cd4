"""Honest clients beside attackers on one real server.

By hand, with the bound on latency judged::

    PYTHONPATH=tests python -m helpers.torture.run --seconds 180

The machine's cores are shared with the attackers, so compare the CPU time of the server's processes
too. To find out which attack costs what, leave some out: ``--without squat never_read``.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from loraplex.engine.config import AdapterConfig, EngineConfig, ModelConfig, ServerConfig
from loraplex.engine.errors import LoraplexError
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.engine.processes.engine import Engine
from loraplex.entrypoints.client.sync_client import Client
from loraplex.memory.config import MemoryConfig
from loraplex.scheduler.config import SchedulerConfig

from helpers.models.hf_models import make_hf_model, make_tokenizer
from helpers.models.peft_adapters import make_adapter
from helpers.running.processes import wait_until
from helpers.torture import attacks
from helpers.torture.cpu_times import CpuTimes

NUM_CLIENTS = 20
PAUSE_S = 0.3
GIVE_UP_S = 90.0
SETTLE_S = 30.0  # for frames that are still on their way when the attackers have gone
AGAIN = ("queue_full", "connection_lost", "engine_dead")
MAX_LATE_S = 2.0
MAX_GROWTH = 100 << 20
KILL_EVERY_S = 30.0  # five deaths in a minute would end the engine
PARAMS = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@dataclass
class Report:
    """The figures of a run: latencies in seconds, memory in bytes by process."""

    idle: list[float] = field(default_factory=list)
    attacked: list[float] = field(default_factory=list)
    cut: list[float] = field(default_factory=list)  # requests that lost their connection meanwhile
    wrong: list[str] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)  # by code; the client asks again
    growth: dict[str, int] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    cpu_s: dict[str, float] = field(default_factory=dict)  # under attack
    rounds: dict[str, int] = field(default_factory=dict)
    num_kills: int = 0

    @property
    def most_late_s(self) -> float:
        """How much later the latest answer came than the latest of the idle server."""
        return max(self.attacked) - max(self.idle)

    def summary(self) -> dict[str, Any]:
        return {
            "idle_s": quantiles(self.idle), "attacked_s": quantiles(self.attacked),
            "cut_s": quantiles(self.cut), "most_late_s": round(self.most_late_s, 3),
            "wrong": len(self.wrong), "refused": self.refused, "kills": self.num_kills,
            "growth_mib": {name: size >> 20 for name, size in self.growth.items()},
            "peak_mib": {name: size >> 20 for name, size in self.peak.items()},
            "cpu_s": self.cpu_s, "rounds": self.rounds,
        }  # fmt: skip


def quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    places = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    found = {n: round(ordered[int(q * (len(ordered) - 1))], 3) for n, q in places.items() if values}
    return {"count": len(values), **found}


def make_config(folder: Path) -> EngineConfig:
    """Save a small model with a tokenizer and adapters a and b, and one that is hostile."""
    model = make_hf_model("llama", folder / "base", seed=3)
    make_tokenizer(folder / "base")
    for seed, name in enumerate("ab"):
        make_adapter(model, folder / name, r=4, alpha=8, targets="all-linear", seed=seed)
    hostile = folder / "hostile"
    hostile.mkdir()
    (hostile / "adapter_config.json").write_text(attacks.HOSTILE)
    (hostile / "adapter_model.safetensors").write_bytes(
        (folder / "a" / "adapter_model.safetensors").read_bytes()
    )
    return EngineConfig(
        model=ModelConfig(
            model=str(folder / "base"), device="cpu", dtype="float32", max_model_len=512
        ),
        memory=MemoryConfig(num_pages=4000),
        scheduler=SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=512),
        adapter=AdapterConfig(
            adapters=tuple((name, str(folder / name)) for name in "ab"), adapter_root=str(folder)
        ),
        server=ServerConfig(endpoint="tcp://127.0.0.1:0"),
    )


class Honest:
    """A client that asks one question again and again, and asks anew when it is refused."""

    def __init__(self, endpoint: str, number: int) -> None:
        self._client = Client(endpoint, timeout_s=60.0)
        self._prompt = [10 + number, *range(40, 52 + number)]
        self._adapter = (None, "a", "b")[number % 3]
        self.expected: list[int] = []

    def ask(self, refused: dict[str, int]) -> tuple[list[int], bool]:
        """Returns the answer, and whether a connection was lost before it came.

        Raises:
            LoraplexError: a refusal that asking again does not mend, or GIVE_UP_S are over.
        """
        was_cut, give_up = False, time.monotonic() + GIVE_UP_S
        while True:
            try:
                outputs = list(
                    self._client.generate(
                        {"prompt_token_ids": self._prompt}, PARAMS, adapter=self._adapter,
                        stream=False, timeout_s=120.0,
                    )
                )  # fmt: skip
                return list(outputs[-1].outputs[0].token_ids), was_cut
            except LoraplexError as error:
                refused[error.code] = refused.get(error.code, 0) + 1
                if error.code not in AGAIN or time.monotonic() > give_up:
                    raise
                was_cut = was_cut or error.code != "queue_full"
                time.sleep(0.1)

    def work(self, report: Report, latencies: list[float], end: float) -> None:
        while time.monotonic() < end:
            began = time.monotonic()
            answer, was_cut = self.ask(report.refused)
            (report.cut if was_cut else latencies).append(time.monotonic() - began)
            self.expected = self.expected or answer
            if answer != self.expected:
                report.wrong.append(f"{self._prompt[:1]}: {answer}, not {self.expected}")
            time.sleep(PAUSE_S)

    def server_is_idle(self) -> bool:
        stats = self._client.stats()
        return bool(stats["running"] == stats["waiting"] == stats["pages_kv"] == 0)

    def close(self) -> None:
        self._client.close()


def work_together(clients: list[Honest], report: Report, latencies: list[float], s: float) -> None:
    """Let all clients work for `s` seconds. An error of one of them is a wrong answer."""
    end = time.monotonic() + s

    def run(client: Honest) -> None:
        try:
            client.work(report, latencies, end)
        except Exception as error:
            report.wrong.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=run, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def memory_of(engine: Engine) -> dict[str, int]:
    return {name: psutil.Process(pid).memory_info().rss for name, pid in engine.pids.items()}


class Watch:
    """Kills the frontend now and then, and keeps the peaks of memory and the CPU time."""

    def __init__(self, engine: Engine, report: Report, seconds: float) -> None:
        self._engine, self._report = engine, report
        self._kill_every_s = min(KILL_EVERY_S, 0.6 * seconds)
        self._cpu = CpuTimes(engine)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc_info: object) -> None:
        self._done.set()
        self._thread.join()
        self._cpu.look()
        self._report.cpu_s = self._cpu.since_start()

    def _run(self) -> None:
        next_kill = time.monotonic() + self._kill_every_s
        while not self._done.wait(0.5):
            self._cpu.look()
            if time.monotonic() >= next_kill:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._engine.pids["frontend 0"], signal.SIGKILL)
                    self._report.num_kills += 1
                next_kill += self._kill_every_s
            try:
                sizes = memory_of(self._engine)
            except psutil.NoSuchProcess:
                continue  # just killed
            peak = self._report.peak
            peak.update({name: max(size, peak.get(name, 0)) for name, size in sizes.items()})


def torture(
    folder: Path, seconds: float, idle_s: float, names: Sequence[str] = attacks.NAMES
) -> Report:
    """Serve honest clients, first alone and then beside the attacks of these names.

    Memory is compared before and after the attacks, when nothing runs.
    """
    report = Report()
    engine = Engine(make_config(folder))
    engine.start()
    try:
        clients = [Honest(engine.endpoint, number) for number in range(NUM_CLIENTS)]
        work_together(clients, Report(), [], 1.0)  # loads adapters, and each client's answer
        work_together(clients, report, report.idle, idle_s)
        before = memory_of(engine)
        attackers = subprocess.Popen(
            [sys.executable, "-m", "helpers.torture.attacks", engine.endpoint, str(folder),
             str(seconds), *names], stdout=subprocess.PIPE, text=True, env=_environment(),
        )  # fmt: skip
        with Watch(engine, report, seconds):
            work_together(clients, report, report.attacked, seconds)
        report.rounds = json.loads(attackers.communicate(timeout=300)[0])
        wait_until(clients[0].server_is_idle)
        settled = time.monotonic() + SETTLE_S
        while True:
            after = memory_of(engine)
            report.growth = {name: after[name] - before[name] for name in before}
            if max(report.growth.values()) < MAX_GROWTH or time.monotonic() > settled:
                break
            time.sleep(0.5)
        for client in clients:
            client.close()
    finally:
        engine.stop()
    return report


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--idle-seconds", type=float, default=30.0)
    parser.add_argument("--only", nargs="+", default=attacks.NAMES, choices=attacks.NAMES)
    parser.add_argument("--without", nargs="+", default=[], choices=attacks.NAMES)
    options = parser.parse_args()
    names = [name for name in options.only if name not in options.without]
    with tempfile.TemporaryDirectory() as folder:
        report = torture(Path(folder), options.seconds, options.idle_seconds, names)
    print(json.dumps(report.summary()))
    print(*report.wrong[:10], sep="\n", file=sys.stderr)
    is_flat = max(report.growth.values()) < MAX_GROWTH
    return int(bool(report.wrong) or not is_flat or report.most_late_s > MAX_LATE_S)


if __name__ == "__main__":
    sys.exit(main())
