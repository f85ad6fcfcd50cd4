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

from loraplex.backends.lora.kernels.sgmv import expand_kernel, shrink_kernel  # noqa: E402

POINTERS = {
    "x": "*bf16", "y": "*bf16", "pool": "*bf16", "v": "*fp32", "scale": "*fp32", "order": "*i64",
    "items": "*i32", "tiles": "*i32", "page_table": "*i32", "rank": "*i32", "a_start": "*i32",
    "b_start": "*i32",
}  # fmt: skip


def compile_ptx(kernel, constants: dict[str, int], **options: int) -> str:
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name in POINTERS or name.endswith("stride") or name == "k_per_split"
    }
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return compiled.asm["ptx"]


@pytest.fixture(autouse=True)
def compiled_not_interpreted():
    if not hasattr(shrink_kernel, "cache_key"):
        pytest.skip("the kernels were imported under TRITON_INTERPRET")


@pytest.mark.parametrize(("block_m", "block_k"), [(16, 256), (64, 64)])
@pytest.mark.parametrize("k", [576, 3584, 4096])
def test_shrink(block_m: int, block_k: int, k: int):
    ptx = compile_ptx(
        shrink_kernel,
        {"K": k, "K_ROW": k, "NUM_MODULES": 3, "PAGE": 32768, "BLOCK_M": block_m,
         "BLOCK_K": block_k, "BLOCK_R": 16, "PDL": True},
        num_warps=4, num_stages=3,
    )  # fmt: skip
    assert re.search(r"mma\.sync|wgmma", ptx)
    assert re.search(r"cp\.async\.c[ag].* 0x10|ld\.global.*v4", ptx)
    assert not re.search(r"ld\.global(\.\w+)*\.b16", ptx), "weights or inputs are read in 2 bytes"


@pytest.mark.parametrize(("block_m", "block_n"), [(16, 256), (64, 128)])
@pytest.mark.parametrize("outs", [(4096, 1024, 1024), (18944, 18944, 0), (576, 0, 0)])
def test_expand(block_m: int, block_n: int, outs: tuple[int, int, int]):
    ptx = compile_ptx(
        expand_kernel,
        {"OUT_0": outs[0], "OUT_1": outs[1], "OUT_2": outs[2], "START_1": outs[0],
         "START_2": outs[0] + outs[1], "PAGE": 32768, "SPLITS": 4, "BLOCK_M": block_m,
         "BLOCK_N": block_n, "BLOCK_R": 16, "PDL": True},
        num_warps=4, num_stages=1,
    )  # fmt: skip
    assert re.search(r"mma\.sync|wgmma", ptx)
    assert not re.search(r"(ld|st)\.global(\.\w+)*\.b16", ptx)


def cuobjdump() -> str | None:
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.exists() else shutil.which("cuobjdump")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("bf16", [0, 1])
@pytest.mark.parametrize(
    "macros",
    [
        *({"K": k, "K_ROW": -(-k // 64) * 64, "NT": nt, "WARPS": 8} for k in (576, 18944)
          for nt in (1, 8)),
        *({"OUT_0": 4096, "OUT_1": 1024, "OUT_2": 1024, "START_1": 4096, "START_2": 5120,
           "ROWS": rows, "THREADS": 128, "SPLITS": splits}
          for rows, splits in ((1, 2), (2, 8), (4, 16))),
    ],
)  # fmt: skip
def test_bgmv(tmp_path, bf16: int, macros: dict[str, int]):
    source = resources.files("loraplex.backends.lora.kernels").joinpath("bgmv.cu")
    macros = macros | {"BF16": bf16, "PAGE": 32768, "NUM_MODULES": 3, "PDL": 1}
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
        # The last wait is that of blocks with nothing to do.
        wait = re.search(r"ACQBULK(?=[^$]*PREEXIT)", sass[sass.index("LDG.E.NA.128") :])
        assert wait, "the weights are fetched only after the wait for the kernel before"
    spilled = re.findall(r"(\d+) bytes spill stores", result.stderr)
    assert max(map(int, spilled)) <= 16
