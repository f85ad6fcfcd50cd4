"""`LLM` over real processes whose worker has no model: see helpers/fake_engine.py."""

import functools
import sys
from pathlib import Path
from typing import Any

from loraplex import LLM
from loraplex.engine.config import AdapterConfig
from loraplex.engine.processes.engine import Engine
from loraplex.entrypoints.offline import local_engine

from helpers.fakes.fake_engine import fake_config

WORKER = Path(__file__).with_name("fake_worker_proc.py")


def start_llm(*worker_options: str, **parts: Any) -> LLM:
    """`parts` replace parts of the configuration, `worker_options` go to fake_worker_proc."""
    command = [sys.executable, str(WORKER), *worker_options]
    original = local_engine.Engine
    local_engine.Engine = functools.partial(Engine, worker_command=command)  # type: ignore
    try:
        return LLM.from_config(fake_config(adapter=AdapterConfig(adapter_root="/"), **parts))
    finally:
        local_engine.Engine = original  # type: ignore[misc]


def pids_of(llm: LLM) -> dict[str, int]:
    engine = llm._engine._engine
    assert engine is not None
    return engine.pids
