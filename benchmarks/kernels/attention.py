"""Measures how close each attention backend comes to the GPU's copy bandwidth and matmul rate.

Decode is compared with the copy bandwidth, prefill with matmul; both are measured in the same run.
Pages are shuffled. Every layer holds its own random K and V, together more than the L2 cache. Every
launch is timed inside a CUDA graph: `any batch` means that the graph may be replayed for other
batches, `this batch` that it serves one. Decode counts the bytes of K and V that are read, prefill
the products that a causal mask leaves.

    python benchmarks/kernels/attention.py --out benchmarks/results/attention.jsonl
"""

import argparse
import json
import platform
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from loraplex.backends.attention.contract import (
    AttentionBatch,
    AttentionOp,
    AttentionPlan,
    AttentionSpec,
)
from loraplex.backends.attention.flashinfer.attention import FlashInferAttention
from loraplex.backends.registry import resolve
from loraplex.entrypoints.bench.gpu_timing import copy_bandwidth, time_graph

HEAD_DIM = 128
POOL_BYTES = 1 << 30
"""Bytes of K and V that are read, at least, before the same ones are read again."""
MAX_LAYERS = 12
NUM_REPEATS = 20
FA2 = "flashinfer-fa2"
"""flashinfer with the older prefill kernels, which also decode on tensor cores."""


@dataclass(frozen=True)
class Case:
    """`num_seqs` sequences that feed `num_new` tokens each after `num_cached`."""

    num_seqs: int
    num_new: int
    num_cached: int
    num_heads: int
    num_kv_heads: int

    @property
    def is_decode(self) -> bool:
        return self.num_new == 1

    @property
    def context(self) -> int:
        return self.num_cached + self.num_new

    @property
    def title(self) -> str:
        heads = f"{self.num_heads}/{self.num_kv_heads} heads"
        if self.is_decode:
            return f"decode  {self.num_seqs:3} x 1 of {self.context:5}, {heads}"
        return f"prefill {self.num_seqs:3} x {self.num_new} of {self.context:5}, {heads}"

    @property
    def kv_elems(self) -> int:
        """The elements of K and V of one layer."""
        return self.num_seqs * self.context * 2 * self.num_kv_heads * HEAD_DIM

    @property
    def flops(self) -> int:
        in_sight = self.num_new * self.num_cached + self.num_new * (self.num_new + 1) // 2
        return 4 * self.num_seqs * in_sight * self.num_heads * HEAD_DIM


CASES = (
    Case(64, 1, 499, 32, 8),
    Case(256, 1, 511, 32, 8),
    Case(32, 1, 2047, 32, 8),
    Case(32, 1, 255, 32, 32),
    Case(256, 1, 399, 32, 32),
    Case(4, 2048, 0, 32, 8),
    Case(1, 8192, 0, 32, 8),
    Case(8, 512, 3584, 32, 8),
)


class Setup:
    """Pool, queries and batch of one case, filled with random numbers."""

    def __init__(
        self, case: Case, block_tokens: int, dtype: torch.dtype, kv_dtype: torch.dtype
    ) -> None:
        self.case, self.block_tokens = case, block_tokens
        pages_each = -(-case.context // block_tokens)
        num_tokens = case.num_seqs * case.num_new
        self.spec = AttentionSpec(
            num_heads=case.num_heads,
            num_kv_heads=case.num_kv_heads,
            head_dim=HEAD_DIM,
            block_tokens=block_tokens,
            scale=HEAD_DIM**-0.5,
            dtype=dtype,
            device=torch.device("cuda", torch.cuda.current_device()),
            max_num_seqs=case.num_seqs,
            max_num_tokens=num_tokens,
            max_pages=pages_each,
            kv_dtype=kv_dtype,
        )
        self.kv_bytes = case.kv_elems * kv_dtype.itemsize
        self.num_layers = min(MAX_LAYERS, 1 + POOL_BYTES // self.kv_bytes)
        num_pages = case.num_seqs * pages_each + 1
        shape = (self.num_layers, num_pages, 2, block_tokens, case.num_kv_heads, HEAD_DIM)
        self.kv = torch.empty(shape, dtype=kv_dtype, device="cuda")
        for layer in self.kv:
            layer.copy_(torch.randn(layer.shape, dtype=dtype, device="cuda"))
        q_shape = (self.num_layers, num_tokens, case.num_heads, HEAD_DIM)
        self.q = torch.empty(q_shape, dtype=dtype, device="cuda").normal_()
        self.out = torch.zeros_like(self.q)
        pages = np.random.default_rng(0).permutation(num_pages - 1).astype(np.int32) + 1
        self.batch = AttentionBatch(
            query_lens=np.full(case.num_seqs, case.num_new, dtype=np.int32),
            kv_lens=np.full(case.num_seqs, case.context, dtype=np.int32),
            num_decodes=case.num_seqs if case.is_decode else 0,
            page_table=pages.reshape(case.num_seqs, pages_each),
        )

    def run(self, op: AttentionOp, plan: AttentionPlan) -> None:
        for q, kv, out in zip(self.q, self.kv, self.out, strict=True):
            op.run(plan, q=q, kv=kv, out=out)

    def check(self) -> float:
        """The largest error of some rows against fp32, over the largest value expected.

        Raises:
            ArithmeticError: it is too large.
        """
        case, worst = self.case, 0.0
        for layer in {0, self.num_layers - 1}:
            kv = self.kv[layer].float()
            for seq in {0, case.num_seqs // 2, case.num_seqs - 1}:
                for new in {0, case.num_new // 3, case.num_new - 1}:
                    want = self._expect(kv, layer, seq, case.num_cached + new + 1)
                    got = self.out[layer, seq * case.num_new + new].float()
                    error = (got - want).abs().max() / want.abs().max()
                    worst = max(worst, float(error.nan_to_num(float("inf"))))
        if worst > 0.03:
            raise ArithmeticError(f"wrong by {worst:.3f} of the largest value")
        return worst

    def _expect(self, kv: torch.Tensor, layer: int, seq: int, seen: int) -> torch.Tensor:
        """[num_heads, HEAD_DIM] of the token that sees positions 0 to `seen` - 1."""
        case = self.case
        pages = torch.from_numpy(self.batch.page_table[seq]).long().cuda()
        k, v = (kv[pages, i].flatten(0, 1)[:seen] for i in (0, 1))
        q = self.q[layer, seq * case.num_new + seen - case.num_cached - 1].float()
        q = q.view(case.num_kv_heads, -1, HEAD_DIM)
        weights = torch.einsum("kgd,lkd->kgl", q, k).mul(self.spec.scale).softmax(-1)
        return torch.einsum("kgl,lkd->kgd", weights, v).flatten(0, 1)


def matmul_peak(dtype: torch.dtype) -> float:
    """Operations a second of a large product of random matrices."""
    a, b = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
    out = torch.mm(a, b)
    us = statistics.median(time_graph(lambda: torch.mm(a, b, out=out), NUM_REPEATS))
    return 2 * 8192**3 / us * 1e6


def make_op(name: str, spec: AttentionSpec) -> AttentionOp:
    """
    Raises:
        BackendError: it cannot run here.
    """
    backend = resolve("attention", name.removesuffix("-fa2"), spec)
    return FlashInferAttention(spec, "fa2", "fa2") if name == FA2 else backend.make(spec)


def measure(case: Case, name: str, options: argparse.Namespace, peak: float) -> dict[str, object]:
    """One row; `peak` in bytes a second for decode, operations a second for prefill."""
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    kv_dtype = torch.float8_e4m3fn if options.kv_dtype == "fp8" else dtype
    setup = Setup(case, options.block_tokens, dtype, kv_dtype)
    op = make_op(name, setup.spec)
    for_any = case.is_decode and op.supports_graphs
    plan = op.plan_graph(setup.batch, case.num_seqs) if for_any else op.plan(setup.batch)
    setup.run(op, plan)
    error = setup.check()
    times = [us / setup.num_layers for us in time_graph(lambda: setup.run(op, plan), NUM_REPEATS)]
    us = statistics.median(times)
    rate = (setup.kv_bytes if case.is_decode else case.flops) / us * 1e6
    return {
        **asdict(case),
        "head_dim": HEAD_DIM,
        "block_tokens": options.block_tokens,
        "kv_dtype": options.kv_dtype,
        "num_layers": setup.num_layers,
        "backend": name,
        "prefill_kind": getattr(op, "prefill_kind", None),
        "graph_for": "any batch" if for_any else "this batch",
        "us": round(us, 2),
        "us_min": round(min(times), 2),
        "T_s": round(rate / 1e12, 3),
        "unit": "TB/s" if case.is_decode else "TFLOP/s",
        "of_peak": round(rate / peak, 3),
        "error": round(error, 5),
    }


def print_row(case: Case, row: dict[str, object]) -> None:
    kind = "" if case.is_decode or row["prefill_kind"] is None else f"({row['prefill_kind']})"
    print(
        f"{case.title:38} {str(row['backend']) + kind:20} {row['us']:10} us  "
        f"{row['T_s']:8} {row['unit']:8} {100 * float(str(row['of_peak'])):5.1f} %  "
        f"graph for {row['graph_for']}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", default=f"flashinfer,{FA2},torch,xformers")
    parser.add_argument("--block-tokens", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--kv-dtype", default="auto", choices=("auto", "fp8"))
    parser.add_argument("--only", default="", help="part of a row's title, such as prefill")
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    options = parser.parse_args()
    bandwidth, peak = copy_bandwidth(), matmul_peak(getattr(torch, options.dtype))
    torch.cuda.empty_cache()
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dtype": options.dtype,
        "copy_TB_s": round(bandwidth / 1e12, 3),
        "matmul_TFLOP_s": round(peak / 1e12, 1),
    }
    print(machine)
    # One backend after the other: one that breaks the CUDA context takes no other's rows along.
    for name in options.backends.split(","):
        for case in CASES:
            if options.only not in case.title:
                continue
            try:
                row = measure(case, name, options, bandwidth if case.is_decode else peak)
            except (RuntimeError, ValueError, ArithmeticError) as error:
                print(f"{case.title:38} {name:20} {error}", flush=True)
                continue
            print_row(case, row)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps({**machine, **row}) + "\n")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
