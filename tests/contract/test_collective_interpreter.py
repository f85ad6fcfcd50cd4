"""The collective kernels' arithmetic in Triton's interpreter, one rank after the other.

The meeting of the ranks is left out: it is checked on GPUs by benchmarks/collectives.py.
"""

import subprocess
import sys

CODE = """
import torch
from loraplex.backends.collective.kernels import (
    gather_kernel, reduce_add_norm_kernel, reduce_kernel,
)

def addresses(tensors):
    return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64)

def check(world, rows, size, dtype, programs):
    torch.manual_seed(rows * world)
    parts = [torch.randn(rows, size).to(dtype) for _ in range(world)]
    weight, start = torch.rand(size).to(dtype) + 0.5, torch.randn(rows, size).to(dtype)
    total = sum(p.double() for p in parts)
    before = (total + start.double()).to(dtype).double()
    expected = before * torch.rsqrt(before.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
    block = 1 << (size - 1).bit_length()
    flags = torch.zeros(world, dtype=torch.int64)
    tolerance = dict(atol=5e-3, rtol=5e-3) if dtype == torch.float16 else dict(atol=1e-5, rtol=1e-5)
    for two_shot in (False, True):
        outs = [torch.full((rows, size), float("nan"), dtype=dtype) for _ in range(world)]
        residuals = [start.clone() for _ in range(world)]
        for rank in range(world):
            reduce_add_norm_kernel[(programs,)](
                residuals[rank], weight, outs[rank], addresses(parts), flags, addresses(outs),
                rows, 1e-5, SIZE=size, BLOCK=block, RANK=rank, WORLD=world, TWO_SHOT=two_shot,
                MEET=False, PDL=False,
            )
        share = -(-rows // world)
        for rank, out in enumerate(outs):
            assert torch.equal(out, outs[0])
            torch.testing.assert_close(out.double(), expected, **tolerance)
            mine = slice(rank * share, (rank + 1) * share) if two_shot else slice(None)
            torch.testing.assert_close(residuals[rank][mine].double(), before[mine], **tolerance)
    out = torch.empty(rows, size, dtype=dtype)
    reduce_kernel[(programs,)](
        out, addresses(parts), flags, rows, SIZE=size, BLOCK=block, RANK=0, WORLD=world,
        MEET=False, PDL=False,
    )
    torch.testing.assert_close(out.double(), total, **tolerance)
    gathered = [torch.full((rows, world * size), float("nan"), dtype=dtype) for _ in range(world)]
    for rank in range(world):
        gather_kernel[(programs,)](
            parts[rank], addresses(gathered), flags, rows, WIDTH=size, BLOCK=16, RANK=rank,
            WORLD=world, MEET=False, PDL=False,
        )
    assert all(torch.equal(g, torch.cat(parts, 1)) for g in gathered)

for world, rows, size, dtype, programs in (
    (2, 1, 24, torch.float32, 1), (2, 3, 64, torch.float16, 2), (4, 7, 40, torch.float32, 3),
    (3, 10, 16, torch.float32, 16), (4, 2, 32, torch.float16, 1),
):
    check(world, rows, size, dtype, programs)
print("right")
"""


def test_every_size_is_the_float64_sum() -> None:
    environment = {"TRITON_INTERPRET": "1"}
    import os

    result = subprocess.run(
        [sys.executable, "-P", "-c", CODE], env={**os.environ, **environment},
        capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert result.stdout.strip() == "right", result.stderr[-2000:]
