"""`LLM` over real processes whose worker has no model: see helpers/fakes/fake_engine.py."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from loraplex import LLM
from loraplex.engine.config import AdapterConfig
from loraplex.engine.processes.engine import Engine
from loraplex.entrypoints.offline import local_engine

from helpers.fakes.fake_engine import fake_config

WORKER = Path(__file__).with_name("fake_worker_proc.py")
_engines: WeakKeyDictionary[LLM, Engine] = WeakKeyDictionary()


@contextmanager
def fake_workers(*worker_options: str) -> Iterator[list[Engine]]:
    """Yields the engines that LLMs start meanwhile; `worker_options` go to fake_worker_proc."""
    made: list[Engine] = []

    def make_engine(*args: Any, **options: Any) -> Engine:
        command = [sys.executable, str(WORKER), *worker_options]
        made.append(Engine(*args, worker_command=command, **options))
        return made[-1]

    original = local_engine.Engine
    local_engine.Engine = make_engine  # type: ignore
    try:
        yield made
    finally:
        local_engine.Engine = original  # type: ignore[misc]


def start_llm(*worker_options: str, **parts: Any) -> LLM:
    """`parts` replace parts of the configuration."""
    with fake_workers(*worker_options) as made:
        llm = LLM.from_config(fake_config(adapter=AdapterConfig(adapter_root="/"), **parts))
    _engines[llm] = made.pop()
    return llm


def pids_of(llm: LLM) -> dict[str, int]:
    """Process ids by name, of an LLM made by `start_llm`."""
    return _engines[llm].pids
