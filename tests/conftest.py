"""Shares the cores among the test processes. Runs before any test imports torch."""

import os

import pytest

MAX_PROCESSES = 16
NUM_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
NUM_PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

# An idle OpenMP thread that spins takes a core from another test process.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if NUM_PROCESSES > 1:
    # The engines that tests start inherit this too.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (NUM_CORES or 1) // NUM_PROCESSES)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Returns the number of test processes of ``-n auto``: one for each core, at most 16."""
    return min(NUM_CORES or 1, MAX_PROCESSES)
