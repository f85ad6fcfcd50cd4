"""Real engine processes for tests: with a fake worker they start in a second."""

import glob
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from loraplex.engine.config import EngineConfig
from loraplex.engine.processes.engine import Engine

FAKE_WORKER = Path(__file__).parents[1] / "fakes" / "fake_worker_proc.py"


def fake_worker_command(*options: str) -> list[str]:
    return [sys.executable, str(FAKE_WORKER), *options]


def make_engine(config: EngineConfig, *worker_options: str, **options: Any) -> Engine:
    return Engine(config, worker_command=fake_worker_command(*worker_options), **options)


@contextmanager
def running_engine(config: EngineConfig, *worker_options: str) -> Iterator[Engine]:
    """Started; stopped at the end, whatever happened, and checked to have left nothing."""
    engine = make_engine(config, *worker_options)
    engine.start(timeout_s=60)
    left = leftovers(engine)
    try:
        yield engine
    finally:
        engine.stop()
    assert_gone(left)


def leftovers(engine: Engine) -> dict[str, Any]:
    """What a running engine would leave behind if it were careless."""
    scheme, _, path = engine.endpoint.partition("://")
    return {
        "pids": list(engine.pids.values()),
        "paths": [engine._group.run_dir, *([path] if scheme == "ipc" else [])],
    }


def assert_gone(left: dict[str, Any], within_s: float = 5.0) -> None:
    """Every process has ended and every path is gone."""
    wait_until(lambda: not any(map(is_alive, left["pids"])), within_s)
    wait_until(lambda: not any(map(os.path.lexists, left["paths"])), within_s)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], object], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s"
        time.sleep(0.01)


def run_dirs() -> set[str]:
    return set(glob.glob(os.path.join(tempfile.gettempdir(), "loraplex-*")))
