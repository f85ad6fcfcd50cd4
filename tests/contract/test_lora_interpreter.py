"""The Triton kernels in Triton's interpreter, against the fp32 loop: no GPU is needed.

In a process of its own, since TRITON_INTERPRET is read when a kernel is defined. bfloat16 is left
out: the interpreter gets it wrong.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
CASES = (
    "test_rank_mixes and subsets and torch.float16",
    "test_popularities and skewed and 7 or test_page_sizes and 64 and True",
    "test_prefill_beside_decode and 16",
)


@pytest.mark.parametrize("case", CASES)
def test_triton(case: str) -> None:
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider",
               str(HERE / "test_lora_op.py"), "-k", f"triton and cpu and ({case})"]  # fmt: skip
    result = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, cwd=HERE.parents[1],
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    summary = result.stdout.strip().splitlines()[-1]
    assert "passed" in summary and "skipped" not in summary, summary
