"""Every fused kernel compiles for sm_90 on a machine with no GPU, with 16-byte accesses."""

import re

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from loraplex.backends.fused.kernels.draw import (  # noqa: E402
    draw_merge_kernel,
    draw_split_kernel,
)
from loraplex.backends.fused.kernels.layer import (  # noqa: E402
    quantize_rows_kernel,
    rms_norm_kernel,
    rope_store_kv_kernel,
    silu_mul_fp8_kernel,
    silu_mul_kernel,
)

POINTERS = {
    "cos_sin": "*fp32", "kv_rows": "*i64", "temperature": "*fp32", "keys": "*i64",
    "candidates": "*i64", "sampled": "*i64", "scales": "*fp32", "values": "*fp8e4nv",
    "mask_places": "*i32", "masks": "*i32",
}  # fmt: skip
INTEGERS = ("num_masks", "num_splits", "split_size")
NARROW = r"(ld|st)\.global(\.\w+)*\.b16"
WIDE_LOAD = r"ld\.global(\.\w+)*\.v4\.b32"
WIDE_STORE = r"st\.global(\.\w+)*\.v4\.b32"


def compile_ptx(
    kernel,
    dtype: str,
    constants: dict[str, int | bool],
    num_warps: int,
    pointers: dict[str, str] | None = None,
) -> str:
    names, signature = kernel.arg_names, {}
    pointers = POINTERS | (pointers or {})
    for name in names:
        is_integer = name in INTEGERS or name.endswith("stride")
        kind = "i32" if is_integer else "fp32" if name == "eps" else pointers.get(name, f"*{dtype}")
        signature[name] = "constexpr" if name in constants else kind
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name.endswith("stride") or name == "split_size"
    }
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    options = {"num_warps": num_warps}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


@pytest.fixture(autouse=True)
def compiled_not_interpreted():
    if not hasattr(rms_norm_kernel, "cache_key"):
        pytest.skip("the kernels were imported under TRITON_INTERPRET")


@pytest.mark.parametrize(("size", "add", "dtype"), [(576, False, "fp16"), (3584, True, "bf16")])
def test_rms_norm(size: int, add: bool, dtype: str):
    block = triton.next_power_of_2(size)
    constants = {"SIZE": size, "BLOCK": block, "ADD": add, "FP8": False, "PDL": True}
    ptx = compile_ptx(rms_norm_kernel, dtype, constants, block // 256)
    assert len(re.findall(WIDE_LOAD, ptx)) == (3 if add else 2)
    assert len(re.findall(WIDE_STORE, ptx)) == (2 if add else 1)
    assert not re.search(NARROW, ptx)


def test_silu_mul():
    constants = {"SIZE": 18944, "BLOCK": 1024, "PDL": True}
    ptx = compile_ptx(silu_mul_kernel, "bf16", constants, 4)
    assert len(re.findall(WIDE_LOAD, ptx)) == 2 and len(re.findall(WIDE_STORE, ptx)) == 1
    assert not re.search(NARROW, ptx)


def test_rows_in_e4m3():
    constants = {"SIZE": 14336, "BLOCK": 16384, "PDL": True}
    norm = {"SIZE": 4096, "BLOCK": 4096, "ADD": True, "FP8": True, "PDL": True}
    for kernel, values in (
        (quantize_rows_kernel, constants), (silu_mul_fp8_kernel, constants), (rms_norm_kernel, norm)
    ):  # fmt: skip
        ptx = compile_ptx(kernel, "bf16", values, 16)
        assert re.search(r"cvt\.rn\.satfinite\.e4m3x2\.f32", ptx)
        assert re.search(WIDE_LOAD, ptx) and not re.search(NARROW, ptx)


@pytest.mark.parametrize("pages", ["bf16", "fp8e4nv"])
@pytest.mark.parametrize(
    ("head_dim", "num_heads", "num_kv_heads", "norm"),
    [(128, 32, 8, False), (80, 9, 3, False), (128, 16, 8, True)],
)
def test_rope_store_kv(head_dim: int, num_heads: int, num_kv_heads: int, norm: bool, pages: str):
    half = triton.next_power_of_2(head_dim // 2)
    constants = {
        "NUM_HEADS": num_heads, "NUM_KV_HEADS": num_kv_heads, "HEAD_DIM": head_dim,
        "BLOCK_TOKENS": 16, "HEADS": 8, "BLOCK_D": half, "NORM": norm, "PDL": True,
    }  # fmt: skip
    ptx = compile_ptx(rope_store_kv_kernel, "bf16", constants, 8 * half // 256, {"kv": f"*{pages}"})
    num_wide = 6 if pages == "bf16" else 2  # two halves of q, of k and of v
    assert len(re.findall(WIDE_STORE, ptx)) == num_wide
    assert not re.search(NARROW, ptx)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_draw(dtype: str):
    constants = {"VOCAB": 128256, "BLOCK": 1024, "PDL": True}
    ptx = compile_ptx(draw_split_kernel, dtype, constants, 4)
    assert re.search(WIDE_LOAD, ptx) and not re.search(NARROW, ptx)
    # An approximate logarithm is wrong by more than its value where the noise decides.
    assert "lg2.approx" not in ptx
    merge = compile_ptx(draw_merge_kernel, "bf16", {"MAX_SPLITS": 256, "PDL": True}, 1)
    assert "st.global" in merge
