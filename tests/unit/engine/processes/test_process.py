"""Environment of a new child of the engine."""

import sys

import pytest

from loraplex.engine.config import EngineConfig
from loraplex.engine.ipc.messages.lifecycle import ChildStart
from loraplex.engine.processes.process import Process, ProcessSpec

SHOW = """
import os, sys
names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OF_THE_CALLER")
os.write(int(sys.argv[1]), " ".join(os.environ.get(name, "-") for name in names).encode())
"""


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({}, "1000 - -"),
        ({"GOMP_SPINCOUNT": "7", "OF_THE_CALLER": "x"}, "7 - x"),
        ({"OMP_WAIT_POLICY": "active"}, "- active -"),
    ],
)
def test_threads_of_a_child_do_not_spin_unless_the_caller_wants_it(
    given: dict[str, str], seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    spec = ProcessSpec("worker", 0, [sys.executable, "-c", SHOW])
    process = Process.spawn(spec, ChildStart("worker 0", 0, "", EngineConfig()))
    assert process.reports.read().decode() == seen
    assert process.popen.wait(120) == 0
    process.exited.set()
    process.close()
