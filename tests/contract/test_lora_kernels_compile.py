"""Every LoRA kernel compiles for sm_90 on a machine with no GPU, with 16-byte loads of weights."""

import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from loraplex.backends.lora.sgmv.blocks import expand_blocks, shrink_blocks, tuned_for  # noqa: E402
from loraplex.backends.lora.sgmv.kernels import expand_kernel, shrink_kernel  # noqa: E402
from loraplex.backends.lora.vectors.kernels import vectors_kernel  # noqa: E402

POINTERS = {
    "x": "*bf16", "y": "*bf16", "pool": "*bf16", "v": "*fp32", "scale": "*fp32", "meta": "*i32",
    "page_table": "*i32", "rank": "*i32", "a_start": "*i32", "b_start": "*i32",
    "gain_start": "*i32", "shift_start": "*i32",
}  # fmt: skip
ALIGNED = {*POINTERS, "x_stride", "y_stride", "layer_stride"}
COMMON = {
    "HEADER": 16, "ORDER_AT": 64, "FIRST_MODULE": 0, "NUM_MODULES": 3,
    "PAGE": 32768, "ALIGN": 64, "PDL": True,
}  # fmt: skip
E4M3 = {"PAGE": 65536, "ALIGN": 128}
REGIMES = [("decode", 16), ("prefill", 16), ("prefill", 64)]


def compile_ptx(kernel, constants: dict[str, int], pool: str = "*bf16", **options: int) -> str:
    names = kernel.arg_names
    types = POINTERS | {"layer_stride": "i64", "pool": pool}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32") for name in names
    }
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in ALIGNED},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.metadata.shared < 227 * 1024
    return compiled.asm["ptx"]


@pytest.fixture(autouse=True)
def compiled_not_interpreted():
    if not hasattr(shrink_kernel, "cache_key"):
        pytest.skip("the kernels were imported under TRITON_INTERPRET")


@pytest.mark.parametrize(("regime", "ranks"), REGIMES)
@pytest.mark.parametrize("k", [576, 18944])
def test_shrink(regime: str, ranks: int, k: int):
    blocks = shrink_blocks(tuned_for((9, 0)), regime, ranks, k)
    together = 1 << (3 * ranks - 1).bit_length()
    sizes = {"K": k, "BLOCK_M": blocks.rows, "BLOCK_R": min(blocks.max_ranks, together)}
    ptx = compile_ptx(
        shrink_kernel, COMMON | sizes, num_warps=blocks.warps, num_stages=blocks.stages
    )
    assert re.search(r"mma\.sync" if blocks.rows < 64 else r"wgmma", ptx)
    copies = re.findall(r"cp\.async\.c[ag]\S* \[[^]]*\], \[[^]]*\], (\w+)", ptx)
    assert copies and set(copies) == {"0x10"}, "weights and inputs come 16 bytes at a time"
    # Two copies a stage; all stages but two are still on their way when a product begins.
    depth = re.findall(r"cp\.async\.wait_group\s+(0x\w+|\d+)", ptx)
    assert max(int(n, 0) for n in depth) >= 2 * (blocks.stages - 2), (
        "the loop over K is not pipelined"
    )


@pytest.mark.parametrize(
    ("regime", "ranks"),
    [REGIMES[0], *(pytest.param(*r, marks=pytest.mark.long) for r in REGIMES[1:])],
)
def test_weights_in_e4m3(regime: str, ranks: int):
    """Their loads keep the width, and are converted by the instruction for two numbers."""
    shrink = shrink_blocks(tuned_for((9, 0)), regime, ranks, 4096)
    together = 1 << (3 * ranks - 1).bit_length()
    sizes = {"K": 4096, "BLOCK_M": shrink.rows, "BLOCK_R": min(shrink.max_ranks, together)}
    ptx = compile_ptx(
        shrink_kernel, COMMON | E4M3 | sizes, "*fp8e4nv",
        num_warps=shrink.warps, num_stages=shrink.stages,
    )  # fmt: skip
    copies = re.findall(r"cp\.async\.c[ag]\S* \[[^]]*\], \[[^]]*\], (\w+)", ptx)
    assert copies and set(copies) == {"0x10"}
    expand = expand_blocks(tuned_for((9, 0)), regime, ranks, 6144)
    sizes = {
        "OUT_0": 4096, "OUT_1": 1024, "OUT_2": 1024, "START_1": 4096, "START_2": 5120,
        "MAX_SPLITS": 8, "BLOCK_M": expand.rows, "BLOCK_N": expand.columns,
        "BLOCK_R": expand.ranks, "MAX_RANK": 64,
    }  # fmt: skip
    expanding = compile_ptx(
        expand_kernel, COMMON | E4M3 | sizes, "*fp8e4nv", num_warps=expand.warps, num_stages=1,
        maxnreg=expand.max_registers,
    )  # fmt: skip
    assert not re.search(r"(ld|st)\.global(\.\w+)*\.b(8|16)", expanding)
    assert all("cvt.rn.f16x2.e4m3x2" in text for text in (ptx, expanding))


@pytest.mark.parametrize("outs", [(4096, 1024, 1024), (14336, 14336, 0), (576, 0, 0)])
def test_vectors(outs: tuple[int, int, int]):
    sizes = {
        "OUT_0": outs[0], "OUT_1": outs[1], "OUT_2": outs[2], "START_1": outs[0],
        "START_2": outs[0] + outs[1], "FIRST_MODULE": 0, "NUM_MODULES": 3 - outs.count(0),
        "PAGE": 32768, "BLOCK": 1024,
    }  # fmt: skip
    ptx = compile_ptx(vectors_kernel, sizes, num_warps=4)
    loads = [re.sub(r".*(v\d\.b32|v\d\.b16|b64).*", r"\1", line) for line in ptx.splitlines()
             if re.search(r"ld\.global.*(v\d|b64)", line)]  # fmt: skip
    assert loads, "rows of y and of vectors come several bytes at a time"


@pytest.mark.parametrize(("regime", "ranks"), REGIMES)
@pytest.mark.parametrize("outs", [(4096, 1024, 1024), (18944, 18944, 0)])
def test_expand(regime: str, ranks: int, outs: tuple[int, int, int]):
    blocks = expand_blocks(tuned_for((9, 0)), regime, ranks, sum(outs))
    sizes = {
        "OUT_0": outs[0], "OUT_1": outs[1], "OUT_2": outs[2], "START_1": outs[0],
        "START_2": outs[0] + outs[1], "MAX_SPLITS": 8, "BLOCK_M": blocks.rows,
        "BLOCK_N": blocks.columns, "BLOCK_R": blocks.ranks, "MAX_RANK": 64,
    }  # fmt: skip
    ptx = compile_ptx(
        expand_kernel, COMMON | sizes, num_warps=blocks.warps, num_stages=1,
        maxnreg=blocks.max_registers,
    )  # fmt: skip
    assert re.search(r"mma\.sync|wgmma", ptx)
    assert re.search(r"st\.global\.v4\.b32", ptx) and re.search(r"ld\.global\.v4\.b32", ptx)
    assert not re.search(r"(ld|st)\.global(\.\w+)*\.b16", ptx)


def cuobjdump() -> str | None:
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.exists() else shutil.which("cuobjdump")


QKV = {"NUM_MODULES": 3, "K": 4096, "OUT_0": 4096, "OUT_1": 1024, "OUT_2": 1024,
       "START_1": 4096, "START_2": 5120}  # fmt: skip
DOWN = {"NUM_MODULES": 1, "K": 14336, "OUT_0": 4096, "OUT_1": 0, "OUT_2": 0,
        "START_1": 0, "START_2": 0}  # fmt: skip
SMALL = {"NUM_MODULES": 2, "K": 576, "OUT_0": 1536, "OUT_1": 1536, "OUT_2": 0,
         "START_1": 1536, "START_2": 0}  # fmt: skip
BGMV = {"PAGE": 32768, "PDL": 1, "GROUP": 1, "NUM_GROUPS": 4, "MAX_SPLITS": 16, "MAX_RANK": 64,
        "WARPS": 8, "THREADS": 128}  # fmt: skip


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("e4m3", [0, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("nt", "rows"), [(1, 1), (2, 4), (2, 16)], ids=["distinct", "shared", "many"]
)
@pytest.mark.parametrize(
    ("group", "bf16"),
    [
        pytest.param(QKV, 1, id="qkv-bf16"),
        pytest.param(SMALL, 0, id="small-fp16"),
        pytest.param(QKV, 0, id="qkv-fp16", marks=pytest.mark.long),
        pytest.param(SMALL, 1, id="small-bf16", marks=pytest.mark.long),
        pytest.param(DOWN, 1, id="down-bf16", marks=pytest.mark.long),
        pytest.param(DOWN, 0, id="down-fp16", marks=pytest.mark.long),
    ],
)
def test_bgmv(tmp_path, bf16: int, group: dict[str, int], nt: int, rows: int, e4m3: int):
    source = resources.files("loraplex.backends.lora.bgmv").joinpath("bgmv.cu")
    unit = 128 if e4m3 else 64
    macros = BGMV | group | {"BF16": bf16, "K_ROW": -(-group["K"] // unit) * unit}
    macros |= {"NT": nt, "ROWS": rows, "E4M3": e4m3, "UNIT": unit}
    defines = [f"-D{name}={value}" for name, value in macros.items()]
    result = subprocess.run(
        ["nvcc", "-arch=sm_90a", "-cubin", "-Xptxas", "-v", "-o", tmp_path / "kernel.cubin",
         *defines, str(source)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    if (tool := cuobjdump()) is not None:
        sass = subprocess.run(
            [tool, "--dump-sass", tmp_path / "kernel.cubin"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        for kernel in sass.split("Function :")[1:]:
            # The last wait, without PREEXIT after it, belongs to blocks with nothing to do.
            marks = (
                r"PREEXIT|ACQBULK|LDG\.E\.NA\.(?:64|128)|LDG\.E\S*\.STRONG\.GPU|LDG\.E\.128(?!\.C)"
            )
            release, *fetched, wait = re.findall(marks, kernel.partition("ACQBULK")[0] + "ACQBULK")
            assert (release, wait) == ("PREEXIT", "ACQBULK"), "the next kernel is released at once"
            is_narrow = e4m3 and "expand" in kernel.partition("\n")[0]
            width = "LDG.E.NA.64" if is_narrow else "LDG.E.NA.128"
            assert set(fetched) == {width}, "weights, and no more, before the wait"
    spilled = re.findall(r"(\d+) bytes spill stores", result.stderr)
    assert max(map(int, spilled)) <= 16
