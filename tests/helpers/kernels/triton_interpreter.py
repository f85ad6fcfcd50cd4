"""Runs tests of Triton kernels in Triton's interpreter, which needs no GPU.

They run in a process of their own, since TRITON_INTERPRET is read when a kernel is defined.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def run_in_interpreter(*files: Path, wanted: str) -> None:
    """Run the cases that `wanted` names, as pytest's -k; none may fail or be skipped."""
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider",
               *map(str, files), "-k", f"triton and cpu and ({wanted})"]  # fmt: skip
    result = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    summary = result.stdout.strip().splitlines()[-1]
    assert "passed" in summary and "skipped" not in summary, summary
