"""The fused Triton kernels in Triton's interpreter, against float64 loops: no GPU is needed.

They run in their own process, since TRITON_INTERPRET is read when a kernel is defined. bfloat16 is
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
    "test_norms and (576 or 77)",
    "test_silu_mul and (1000 or 33)",
    "test_rope_store_kv and float16",
    "test_padded_rows",
    "test_results_in_e4m3 and (576 or 80)",
    "test_pages_in_e4m3",
    "test_draw and (1-50 or 32001 or equals or forbidden or broken or neighbours or masks)",
)
LONG = (
    "test_norms and 3584",
    "test_silu_mul and 1536",
    "test_rope_store_kv and float32",
    "test_draw and 2050",
)


@pytest.mark.parametrize("cases", [FAST, pytest.param(LONG, marks=pytest.mark.long)])
def test_triton(cases: tuple[str, ...]) -> None:
    wanted = " or ".join(f"({case})" for case in cases)
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider",
               str(HERE / "test_fused_op.py"), str(HERE / "test_fused_draw.py"),
               str(HERE / "test_fused_fp8.py"), "-k",
               f"triton and cpu and not bfloat16 and ({wanted})"]  # fmt: skip
    result = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, cwd=HERE.parents[2],
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    summary = result.stdout.strip().splitlines()[-1]
    assert "passed" in summary and "skipped" not in summary, summary
