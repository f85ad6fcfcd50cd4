"""The Triton kernels in Triton's interpreter, against the fp32 loop: no GPU is needed.

bfloat16 is left out: the interpreter computes it wrongly.
"""

from pathlib import Path

import pytest

from helpers.kernels.triton_interpreter import run_in_interpreter

pytest.importorskip("triton")

HERE = Path(__file__).parent
FAST = (
    "test_rank_mixes and subsets and torch.float16",
    "test_prefill_beside_decode and 16",
    "test_plans_are_independent",
    "test_weights_in_e4m3",
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
    run_in_interpreter(HERE / "test_lora_op.py", HERE / "test_lora_passes.py", wanted=wanted)
