"""Measures the LoRA kernels of SGLang and vLLM on the batches of lora_kernels.py.

It times one layer's LoRA work as their engines launch it, shrink and expand for each group of
projections, in a CUDA graph. Weights have the peer's own layout: one tensor for all adapters,
padded to the largest rank. There are as many adapter slots as the batch has adapters, which is the
best case for both. Peers that cannot be imported are left out.

    python benchmarks/kernels/peer_kernels.py --out benchmarks/results/peer_kernels_h200.jsonl
"""

import argparse
import importlib
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch
from lora_kernels import ALL, GROUPS, MODELS, QKVO, Case, rows_of

from loraplex.entrypoints.bench.gpu_timing import copy_bandwidth, time_graph

SCALE = 0.5
SGLANG_CHUNK = 16
"""Rows of a segment: the default of SGLang's --max-lora-chunk-size."""


class Peer(Protocol):
    def run_layer(self, layer: int) -> None: ...


class Batch:
    """The rows of one case, x and y of each group, and random weights.

    Weights are A [adapters, rank, in] and B [adapters, out, rank] for each module.
    """

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        shapes = MODELS[case.model].shapes
        self.case, self.dtype, self.device = case, dtype, device
        self.rows = rows_of(case)
        self.num_adapters, self.rank = max(self.rows) + 1, max(case.ranks)
        groups = [modules for modules in GROUPS if modules[0] in case.modules]
        self.shapes = [[shapes[module] for module in modules] for modules in groups]
        self.x = [self.random(case.num_tokens, of[0].in_features) for of in self.shapes]
        self.y = [
            self.random(case.num_tokens, sum(s.out_features for s in of)) for of in self.shapes
        ]
        ranks = [case.ranks[slot % len(case.ranks)] for slot in range(self.num_adapters)]
        self.ranks = torch.tensor(ranks, dtype=torch.int32, device=device)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(std=0.05)

    def weights(self, of_group: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Returns A and B of one layer's group, by module. Ranks an adapter lacks are zero."""
        is_own = torch.arange(self.rank, device=self.device)[None, :] < self.ranks[:, None]
        a = [self.random(self.num_adapters, self.rank, s.in_features) for s in of_group]
        b = [self.random(self.num_adapters, s.out_features, self.rank) for s in of_group]
        return [w * is_own[:, :, None] for w in a], [w * is_own[:, None, :] for w in b]


class SGLang:
    """The backend `csgmv`, SGLang's default."""

    def __init__(self, batch: Batch) -> None:
        kernels = "sglang.kernels.ops.lora.dense.chunked_sgmv"
        self._shrink = importlib.import_module(f"{kernels}_shrink").chunked_sgmv_lora_shrink_forward
        self._expand = importlib.import_module(f"{kernels}_expand").chunked_sgmv_lora_expand_forward
        info = importlib.import_module("sglang.srt.lora.utils").LoRABatchInfo
        device = batch.device
        order = sorted(range(len(batch.rows)), key=batch.rows.__getitem__)
        starts, of_segment = [0], []
        for at, row in enumerate(order):
            is_new = not of_segment or batch.rows[row] != of_segment[-1]
            if is_new or at - starts[-1] == SGLANG_CHUNK:
                of_segment.append(batch.rows[row])
                starts += [at] if at else []
        starts.append(len(order))

        def int32(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        self._batch = batch
        self._info = info(
            use_cuda_graph=False, bs=len(order), num_segments=len(of_segment),
            seg_indptr=int32(starts), weight_indices=int32(of_segment), lora_ranks=batch.ranks,
            scalings=torch.full((batch.num_adapters,), SCALE, device=device),
            max_len=SGLANG_CHUNK, seg_lens=None, permutation=int32(order),
        )  # fmt: skip
        self._offsets = []
        for of in batch.shapes:
            ends = torch.tensor([0, *(s.out_features for s in of)]).cumsum(0).to(torch.int32)
            self._offsets.append((ends.to(device), ends))
        self.weights = [
            [
                (self._stack(a), torch.cat(b, dim=1).contiguous())
                for a, b in (batch.weights(of) for of in batch.shapes)
            ]
            for _ in range(batch.case.num_layers)
        ]

    def _stack(self, a: list[torch.Tensor]) -> torch.Tensor:
        """[adapters, modules * rank, in]: an adapter's modules, one after another at its rank."""
        stacked = torch.zeros_like(torch.cat(a, dim=1))
        for rank in set(self._batch.case.ranks):
            has_rank = self._batch.ranks == rank
            for index, of_module in enumerate(a):
                stacked[has_rank, index * rank : (index + 1) * rank] = of_module[has_rank, :rank]
        return stacked

    def run_layer(self, layer: int) -> None:
        batch = self._batch
        groups = zip(
            batch.x, batch.y, batch.shapes, self._offsets, self.weights[layer], strict=True
        )
        for x, y, of, (offsets, on_host), (a, b) in groups:
            v = self._shrink(x, a, self._info, len(of))
            widest = max(s.out_features for s in of)
            self._expand(v, b, self._info, offsets, widest, y, slice_offsets_cpu=on_host)


class VLLM:
    """`lora_shrink` and `lora_expand` in Triton, as PunicaWrapperGPU.add_lora_linear calls them."""

    def __init__(self, batch: Batch) -> None:
        ops = "vllm.lora.ops.triton_ops"
        self._shrink = importlib.import_module(f"{ops}.lora_shrink_op").lora_shrink
        self._expand = importlib.import_module(f"{ops}.lora_expand_op").lora_expand
        made = importlib.import_module(f"{ops}.lora_kernel_metadata").LoRAKernelMeta
        num_rows = len(batch.rows)
        self._batch = batch
        meta = made.make(batch.num_adapters, num_rows, batch.device)
        meta.prepare_tensors(torch.tensor(batch.rows, dtype=torch.int32, device=batch.device))
        self._meta = meta.meta_args(num_rows, True)
        self.weights = [
            [batch.weights(of) for of in batch.shapes] for _ in range(batch.case.num_layers)
        ]

    def run_layer(self, layer: int) -> None:
        batch = self._batch
        for x, y, (a, b) in zip(batch.x, batch.y, self.weights[layer], strict=True):
            shape = (len(a), len(x), batch.rank)
            v = torch.empty(shape, dtype=torch.float32, device=batch.device)
            self._shrink(x, a, v, *self._meta, SCALE)
            self._expand(v, b, y, *self._meta, offset_start=0, add_inputs=True)


PEERS: dict[str, Callable[[Batch], Peer]] = {"sglang": SGLang, "vllm": VLLM}


def cases() -> list[Case]:
    return [
        *(Case("llama-3-8b", (16,), ALL, 64, p)
          for p in ("distinct", "uniform", "skewed", "identical")),
        *(Case("llama-3-8b", (16,), ALL, 256, p) for p in ("uniform", "identical")),
        *(Case("llama-2-7b", (8,), QKVO, 32, p) for p in ("distinct", "identical")),
        Case("llama-2-7b", (8, 16, 32, 64), QKVO, 64, "distinct"),
        Case("llama-3-8b", (16,), ALL, 4096, "runs-8", num_layers=8),
    ]  # fmt: skip


def measure(peer: Peer, case: Case) -> dict[str, Any]:
    def run() -> None:
        for layer in range(case.num_layers):
            peer.run_layer(layer)

    times = [t / case.num_layers for t in time_graph(run, 30)]
    return {"us": round(statistics.median(times), 2), "us_min": round(min(times), 2)}


def measure_all() -> Iterator[dict[str, Any]]:
    for case in cases():
        for name, make in PEERS.items():
            batch = Batch(case, torch.bfloat16, torch.device("cuda", 0))
            try:
                peer = make(batch)
            except ImportError as error:
                print(f"{name}: {error}")
                continue
            try:
                release = version(name)
            except PackageNotFoundError:
                release = "unknown"
            yield {**asdict(case), "peer": name, "version": release, **measure(peer, case)}
            del peer, batch
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    options = parser.parse_args()
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
               "dtype": "bfloat16", "copy_TB_s": round(copy_bandwidth() / 1e12, 3)}  # fmt: skip
    for row in measure_all():
        print(f"{row['model']:12} r{row['ranks']} {row['num_tokens']:5} rows {row['popularity']:9} "
              f"{row['peer']:7} {row['us']:9.2f} us", flush=True)  # fmt: skip
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps({**machine, **row}) + "\n")


if __name__ == "__main__":
    main()
