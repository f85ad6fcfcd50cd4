"""The fused Triton kernels in Triton's interpreter, against float64 loops: no GPU is needed.

bfloat16 is left out: the interpreter computes it wrongly.
"""

from pathlib import Path

import pytest

from helpers.kernels.triton_interpreter import run_in_interpreter

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
    files = (HERE / f"test_fused_{part}.py" for part in ("op", "draw", "fp8"))
    run_in_interpreter(*files, wanted=f"not bfloat16 and ({wanted})")
