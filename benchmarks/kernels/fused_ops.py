"""Measures how close a decoder layer's small operators come to the memory floor, in a CUDA graph.

A graph runs one operator over many sets of random tensors in turn, so that none is in the L2 cache,
as far as the memory allows. The floor of a row counts every tensor read or written once, over the
copy bandwidth measured in the same run, without launches. Neighbours in the graph are the same
operator, so the starts and ends of Triton's overlap.

    python benchmarks/kernels/fused_ops.py --out benchmarks/results/fused.jsonl
"""

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from loraplex.backends.fused.contract import FusedOps, FusedSpec
from loraplex.backends.registry import resolve
from loraplex.entrypoints.bench.gpu_timing import copy_bandwidth, time_graph

BLOCK_TOKENS = 16
ROTATED_BYTES = 256 << 20
"""The least bytes of all sets of one graph: five times an H200's L2 cache."""
MAX_COPIES = 200
EPS = 1e-5


@dataclass(frozen=True)
class Model:
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    vocab_size: int


MODELS = {
    "llama-2-7b": Model(4096, 32, 32, 128, 11008, 32000),
    "llama-3-8b": Model(4096, 32, 8, 128, 14336, 128256),
}
TOKENS = (1, 32, 64, 256, 4096)
MAX_DRAW_ROWS = 512

Call = Callable[[FusedOps], object]


@dataclass(frozen=True)
class Case:
    """One operator at one shape: its calls over the rotated sets, and the bytes of each."""

    op: str
    calls: list[Call]
    num_bytes: int


class Cases:
    """Yields the cases of one model and one number of tokens, made one after another."""

    def __init__(self, model: Model, num_tokens: int, dtype: torch.dtype) -> None:
        self._model, self._tokens, self._dtype = model, num_tokens, dtype
        self._size = torch.tensor([], dtype=dtype).element_size()

    def __iter__(self) -> Iterator[Case]:
        yield from (self._rms_norm(), self._add_rms_norm(), self._rope_store_kv())
        yield self._silu_mul()
        if self._tokens <= MAX_DRAW_ROWS:
            yield self._draw("draw, greedy", 0.0)
            yield self._draw("draw, random", 0.8)
            yield self._draw("draw, half of the rows masked", 0.8, is_masked=True)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=self._dtype, device="cuda")

    def _case(self, op: str, make: Callable[[], Call], num_bytes: int) -> Case:
        copies = min(MAX_COPIES, max(8, ROTATED_BYTES // num_bytes))
        return Case(op, [make() for _ in range(copies)], num_bytes)

    def _rms_norm(self) -> Case:
        tokens, hidden = self._tokens, self._model.hidden

        def make() -> Call:
            x, weight = self._random(tokens, hidden), self._random(hidden)
            return lambda op: op.rms_norm(x, weight, EPS)

        return self._case("rms_norm", make, (2 * tokens + 1) * hidden * self._size)

    def _add_rms_norm(self) -> Case:
        tokens, hidden = self._tokens, self._model.hidden

        def make() -> Call:
            x, residual, weight = (self._random(n, hidden) for n in (tokens, tokens, 1))
            return lambda op: op.add_rms_norm(x, residual, weight[0], EPS)

        return self._case("add_rms_norm", make, (4 * tokens + 1) * hidden * self._size)

    def _rope_store_kv(self) -> Case:
        model, tokens = self._model, self._tokens
        width = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
        num_pages = max(2 * tokens, 64)

        def make() -> Call:
            qkv = self._random(tokens, width)
            cos_sin = torch.rand(tokens, model.head_dim, device="cuda")
            shape = (num_pages, 2, BLOCK_TOKENS, model.num_kv_heads, model.head_dim)
            kv = torch.zeros(shape, dtype=self._dtype, device="cuda")
            # Tokens of a decode step: each in a page of its own.
            pages = torch.randperm(num_pages, device="cuda")[:tokens]
            rows = pages * 2 * BLOCK_TOKENS + torch.randint(BLOCK_TOKENS, (tokens,), device="cuda")
            q = torch.empty(
                tokens, model.num_heads, model.head_dim, dtype=self._dtype, device="cuda"
            )
            return lambda op: op.rope_store_kv(qkv=qkv, cos_sin=cos_sin, kv=kv, kv_rows=rows, out=q)

        num_bytes = tokens * (2 * width * self._size + 4 * model.head_dim + 8)
        return self._case("rope_store_kv", make, num_bytes)

    def _silu_mul(self) -> Case:
        tokens, inner = self._tokens, self._model.intermediate

        def make() -> Call:
            gate_up = self._random(tokens, 2 * inner)
            return lambda op: op.silu_mul(gate_up)

        return self._case("silu_mul", make, 3 * tokens * inner * self._size)

    def _draw(self, name: str, temperature: float, *, is_masked: bool = False) -> Case:
        rows, vocab_size = self._tokens, self._model.vocab_size

        def make() -> Call:
            logits = self._random(rows, vocab_size) * 4
            heat = torch.full((rows,), temperature, device="cuda")
            keys = torch.randint(1 << 32, (rows, 2), device="cuda")
            if not is_masked:
                return lambda op: op.draw(logits, heat, keys)
            places = torch.full((rows,), -1, dtype=torch.int32, device="cuda")
            num_masks = -(-rows // 2)
            places[::2] = torch.arange(num_masks, dtype=torch.int32, device="cuda")
            words = -(-vocab_size // 32)
            masks = torch.randint(1 << 31, (num_masks, words), dtype=torch.int32, device="cuda")
            return lambda op: op.draw(logits, heat, keys, mask_places=places, masks=masks)

        return self._case(name, make, rows * (vocab_size * self._size + 28))


def measure(case: Case, op: FusedOps, bandwidth: float) -> dict[str, object]:
    def run() -> None:
        for call in case.calls:
            call(op)

    times = [time / len(case.calls) for time in time_graph(run, 20)]
    return {
        "op": case.op,
        "backend": op.name,
        "us": round(statistics.median(times), 2),
        "us_min": round(min(times), 2),
        "floor_us": round(case.num_bytes / bandwidth * 1e6, 2),
        "copies": len(case.calls),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", default="triton,torch")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    parser.add_argument("--only", default="", help="model name, or part of it")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dtype": options.dtype,
        "copy_TB_s": round(bandwidth / 1e12, 3),
    }
    print(machine)
    for name, model in MODELS.items():
        if options.only not in name:
            continue
        spec = FusedSpec(dtype=dtype, device=torch.device("cuda", 0), head_dim=model.head_dim)
        ops = [resolve("fused", backend).make(spec) for backend in options.backends.split(",")]
        for num_tokens in TOKENS:
            for case in Cases(model, num_tokens, dtype):
                for op in ops:
                    row = {"model": name, "num_tokens": num_tokens} | measure(case, op, bandwidth)
                    print(
                        f"{name} {num_tokens:5} tokens {case.op:14} {op.name:7} {row['us']:9} us "
                        f" floor {row['floor_us']:8}",
                        flush=True,
                    )
                    if options.out:
                        with options.out.open("a") as file:
                            file.write(json.dumps({**machine, **row}) + "\n")
                del case
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
