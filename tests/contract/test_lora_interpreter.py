"""The Triton kernels in Triton's interpreter, against the fp32 loop: no GPU is needed.

It runs in its own process, since TRITON_INTERPRET is read when a kernel is defined. bfloat16 is
left out: the interpreter computes it wrongly.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
FAST = (
    "test_rank_mixes and subsets and torch.float16",
    "test_prefill_beside_decode and 16",
    "test_plans_are_independent",
)
LONG = (
    "test_popularities and distinct",
    "test_popularities and uniform",
    "test_popularities and (skewed or half-base) and 7",
    "test_page_sizes and True",
    "test_weighted_passes",
)


@pytest.mark.parametrize(
    "cases", [FAST, *(pytest.param((case,), marks=pytest.mark.long) for case in LONG)]
)
def test_triton(cases: tuple[str, ...]) -> None:
    wanted = " or ".join(f"({case})" for case in cases)
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider",
               str(HERE / "test_lora_op.py"), str(HERE / "test_lora_passes.py"),
               "-k", f"triton and cpu and ({wanted})"]  # fmt: skip
    result = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, cwd=HERE.parents[1],
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    summary = result.stdout.strip().splitlines()[-1]
    assert "passed" in summary and "skipped" not in summary, summary
