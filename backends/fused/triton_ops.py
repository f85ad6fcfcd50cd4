"""Backend ``triton`` of op ``fused``: one launch an operator, two for `draw`.

In decode every operator is bound by latency. So a program is small: each thread makes one 16-byte
access. Many tokens take many programs.
"""

from typing import Any

import torch
import triton
from triton import knobs

from loraplex.backends.fp8 import Fp8Rows, empty_rows
from loraplex.backends.fused.contract import FusedSpec
from loraplex.backends.fused.kernels.draw import draw_merge_kernel, draw_split_kernel
from loraplex.backends.fused.kernels.layer import (
    quantize_rows_kernel,
    rms_norm_kernel,
    rope_store_kv_kernel,
    silu_mul_fp8_kernel,
    silu_mul_kernel,
)
from loraplex.backends.launch.triton import TritonLaunch

SILU_BLOCK = 1024
HEADS_PER_PROGRAM = 8
DRAW_BLOCK = 1024
MAX_SPLITS = 256
PROGRAMS_PER_PROCESSOR = 8
"""Programs of `draw` that the registers of an SM hold at one time."""


class TritonFused:
    name = "triton"

    @staticmethod
    def probe(spec: FusedSpec | None = None) -> str | None:
        """Returns None when usable, else the reason."""
        interpreted = knobs.runtime.interpret
        if not interpreted and not torch.cuda.is_available():
            return "it needs a CUDA device"
        if spec is None:
            return None
        if spec.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"it takes float16, bfloat16 and float32, not {spec.dtype}"
        if interpreted:
            is_bf16 = spec.dtype == torch.bfloat16
            return "Triton's interpreter gets bfloat16 wrong" if is_bf16 else None
        if spec.device.type != "cuda":
            return f"it needs a CUDA device, not {spec.device.type}"
        return None

    def __init__(self, spec: FusedSpec) -> None:
        self._head_dim = spec.head_dim
        is_cuda = spec.device.type == "cuda"
        # Programmatic dependent launch: Hopper and later have it.
        pdl = is_cuda and torch.cuda.get_device_capability(spec.device)[0] >= 9
        self._options: dict[str, Any] = {"PDL": pdl}
        if pdl:
            self._options["launch_pdl"] = True
        self._launches: dict[tuple[object, ...], TritonLaunch] = {}
        self._draw_programs = PROGRAMS_PER_PROCESSOR * _num_processors(spec.device)

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, fp8: Fp8Rows | None = None
    ) -> torch.Tensor:
        return self._norm(x, x, weight, eps, fp8, is_add=False)

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        fp8: Fp8Rows | None = None,
    ) -> torch.Tensor:
        return self._norm(x, residual, weight, eps, fp8, is_add=True)

    def _norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        fp8: Fp8Rows | None,
        *,
        is_add: bool,
    ) -> torch.Tensor:
        num_rows, size = x.shape
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        strides, is_fp8 = (x.stride()[0], residual.stride()[0]), fp8 is not None
        key = ("norm", size, strides, eps, is_add, is_fp8, x.dtype, weight.dtype)
        launch = self._launches.get(key)
        if launch is None:
            block = triton.next_power_of_2(size)
            launch = self._launches[key] = TritonLaunch(
                rms_norm_kernel, (*strides, eps), SIZE=size, BLOCK=block, ADD=is_add,
                FP8=is_fp8, num_warps=_num_warps(block), **self._options,
            )  # fmt: skip
        values, scales = (y, y) if fp8 is None else (fp8.values, fp8.scales)
        launch(num_rows, x, residual, weight, y, values, scales)
        return y

    def rope_store_kv(
        self,
        *,
        qkv: torch.Tensor,
        cos_sin: torch.Tensor,
        kv: torch.Tensor,
        kv_rows: torch.Tensor,
        out: torch.Tensor,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        num_tokens, width = qkv.shape
        _, _, block_tokens, num_kv_heads, _ = kv.shape
        head_dim, heads = self._head_dim, HEADS_PER_PROGRAM
        num_heads = width // head_dim - 2 * num_kv_heads
        num_blocks = -(-num_heads // heads) + 2 * -(-num_kv_heads // heads)
        stride = qkv.stride()[0]
        has_norm = q_norm is not None and k_norm is not None
        key = ("rope", num_heads, num_kv_heads, block_tokens, stride, eps, has_norm,
               qkv.dtype, kv.dtype)  # fmt: skip
        launch = self._launches.get(key)
        if launch is None:
            half = triton.next_power_of_2(head_dim // 2)
            launch = self._launches[key] = TritonLaunch(
                rope_store_kv_kernel, (stride, eps), NUM_HEADS=num_heads,
                NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_TOKENS=block_tokens,
                HEADS=heads, BLOCK_D=half, NORM=has_norm, num_warps=_num_warps(heads * half),
                **self._options,
            )  # fmt: skip
        if q_norm is None or k_norm is None:
            q_norm = k_norm = out
        launch(num_tokens * num_blocks, qkv, cos_sin, kv, kv_rows, out, q_norm, k_norm)

    def silu_mul(self, gate_up: torch.Tensor, fp8: Fp8Rows | None = None) -> torch.Tensor:
        num_tokens, width = gate_up.shape
        size, stride = width // 2, gate_up.stride()[0]
        y = gate_up.new_empty((num_tokens, size))
        if fp8 is not None:
            by_row = self._row_launch(silu_mul_fp8_kernel, size, stride, gate_up.dtype)
            by_row(num_tokens, gate_up, y, fp8.values, fp8.scales)
            return y
        key = ("silu", size, stride, gate_up.dtype)
        launch = self._launches.get(key)
        if launch is None:
            launch = self._launches[key] = TritonLaunch(
                silu_mul_kernel, (stride,), SIZE=size, BLOCK=SILU_BLOCK,
                num_warps=_num_warps(SILU_BLOCK), **self._options,
            )  # fmt: skip
        launch(num_tokens * -(-size // SILU_BLOCK), gate_up, y)
        return y

    def quantize_rows(self, x: torch.Tensor) -> Fp8Rows:
        num_rows, size = x.shape
        rows = empty_rows(num_rows, size, x.device)
        launch = self._row_launch(quantize_rows_kernel, size, x.stride()[0], x.dtype)
        launch(num_rows, x, rows.values, rows.scales)
        return rows

    def _row_launch(self, kernel: Any, size: int, stride: int, dtype: torch.dtype) -> TritonLaunch:
        """Returns a launch of which each program handles a whole row."""
        key = (kernel, size, stride, dtype)
        launch = self._launches.get(key)
        if launch is None:
            block = triton.next_power_of_2(size)
            launch = self._launches[key] = TritonLaunch(
                kernel, (stride,), SIZE=size, BLOCK=block, num_warps=_num_warps(block),
                **self._options,
            )  # fmt: skip
        return launch

    def draw(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        keys: torch.Tensor,
        *,
        mask_places: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        num_rows, vocab_size = logits.shape
        # No more splits than blocks, and no empty split.
        most = max(1, min(MAX_SPLITS, self._draw_programs // num_rows))
        blocks_per_split = -(-vocab_size // (DRAW_BLOCK * most))
        num_splits = -(-vocab_size // (DRAW_BLOCK * blocks_per_split))
        sampled = logits.new_empty(num_rows, dtype=torch.int32)
        candidates = logits.new_empty(num_rows * num_splits, dtype=torch.int64)  # best of a split
        stride = logits.stride()[0]
        key = ("draw", vocab_size, stride, num_splits, logits.dtype)
        launch = self._launches.get(key)
        if launch is None:
            scalars = (0, stride, num_splits, blocks_per_split * DRAW_BLOCK)
            launch = self._launches[key] = TritonLaunch(
                draw_split_kernel, scalars, VOCAB=vocab_size, BLOCK=DRAW_BLOCK, num_warps=4,
                **self._options,
            )  # fmt: skip
        if mask_places is None or masks is None:
            num_masks, mask_places, masks = 0, sampled, sampled
        else:
            num_masks = len(masks)
        launch(
            num_rows * num_splits, logits, temperature, keys, mask_places, masks, candidates,
            first_scalar=num_masks,
        )  # fmt: skip
        launch = self._launches.get(("merge", num_splits))
        if launch is None:
            launch = self._launches["merge", num_splits] = TritonLaunch(
                draw_merge_kernel, (num_splits,), MAX_SPLITS=MAX_SPLITS, num_warps=1,
                **self._options,
            )  # fmt: skip
        launch(num_rows, candidates, sampled)
        return sampled


def _num_warps(num_elems: int) -> int:
    """Returns the warps with which a thread accesses 8 elements, within a program's limits."""
    return min(16, max(1, num_elems // (8 * 32)))


def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count
