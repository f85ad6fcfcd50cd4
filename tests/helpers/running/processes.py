"""Real engine processes for tests: with a fake worker they start in a second.

Every wait ends when its condition holds. The time limits guard against hangs only: they are far
longer than a busy machine needs.
"""

import glob
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from loraplex.engine.config import EngineConfig
from loraplex.engine.processes.engine import Engine

FAKE_WORKER = Path(__file__).parents[1] / "fakes" / "fake_worker_proc.py"
GUARD_S = 120.0


def fake_worker_command(*options: str) -> list[str]:
    return [sys.executable, str(FAKE_WORKER), *options]


def make_engine(config: EngineConfig, *worker_options: str, **options: Any) -> Engine:
    return Engine(config, worker_command=fake_worker_command(*worker_options), **options)


def start_engine(engine: Engine) -> dict[str, Any]:
    """Start the engine; returns its `leftovers`."""
    before = run_dirs()
    engine.start(timeout_s=GUARD_S)
    return leftovers(engine, before)


@contextmanager
def running_engine(config: EngineConfig, *worker_options: str) -> Iterator[Engine]:
    """Yields a started engine; at the end it is stopped and checked to have left nothing."""
    engine = make_engine(config, *worker_options)
    left = start_engine(engine)
    try:
        yield engine
    finally:
        engine.stop()
    assert_gone(left)


def leftovers(engine: Engine, before: set[str] | None = None) -> dict[str, Any]:
    """Returns the processes and paths that a started engine must remove at its end.

    `before` holds the `run_dirs` from before its start; without it, the engine's folder is only
    known if its endpoint is private.
    """
    scheme, _, path = engine.endpoint.partition("://")
    paths = {path} if scheme == "ipc" else set()
    own = run_dirs() - before if before is not None else run_dirs() & {os.path.dirname(path)}
    assert own or before is None, "the engine has no folder of its own"
    return {"pids": list(engine.pids.values()), "paths": sorted(paths | own)}


def assert_gone(left: dict[str, Any]) -> None:
    """Waits until every process has ended and every path is gone."""
    wait_until(lambda: not any(map(is_alive, left["pids"])))
    wait_until(lambda: not any(map(os.path.lexists, left["paths"])))


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], object], guard_s: float = GUARD_S) -> None:
    deadline = time.monotonic() + guard_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the condition did not hold within {guard_s} s: the test hangs")
        time.sleep(0.01)


def run_dirs() -> set[str]:
    """Returns the folders of this test process's engines; tests/conftest.py sets its TMPDIR."""
    return set(glob.glob(os.path.join(tempfile.gettempdir(), "loraplex-*")))


def worker_pids(besides: Iterable[int] = ()) -> list[int]:
    """Returns the process ids of this process's workers, by rank.

    Args:
        besides: workers of other engines, that are left out.
    """
    children = psutil.Process().children(recursive=True)
    workers = [c.pid for c in children if any(a.endswith("worker_main") for a in c.cmdline())]
    return [pid for pid in workers if pid not in set(besides)]
