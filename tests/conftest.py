"""Keeps test processes apart. Runs before any test imports torch."""

import os
import tempfile
from collections.abc import Iterator

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


@pytest.fixture(scope="session", autouse=True)
def own_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Engines of this test process, and only they, have their folders in its TMPDIR.

    The path is short, because it becomes part of the paths of sockets.
    """
    tmp_path_factory.getbasetemp()  # pytest's own folder stays where it is
    given = os.environ.get("TMPDIR")
    with tempfile.TemporaryDirectory(prefix="tests-", ignore_cleanup_errors=True) as path:
        os.environ["TMPDIR"] = tempfile.tempdir = path
        yield
        tempfile.tempdir = None
        if given is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = given
