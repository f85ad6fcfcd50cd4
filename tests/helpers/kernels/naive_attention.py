"""A paged attention op of plain loops, and a forward context with it, for decoder tests."""

from dataclasses import dataclass

import numpy as np
import torch

from loraplex.backends.attention.contract import AttentionBatch
from loraplex.backends.fused.contract import FusedSpec
from loraplex.backends.fused.torch_ops import TorchFused
from loraplex.backends.lora.contract import LoRAGroup
from loraplex.engine.model.forward_context import ForwardContext
from loraplex.engine.model.spec import ModelSpec


class NaiveAttention:
    """AttentionOp: one query token and one head at a time, in float32."""

    name = "naive"

    def __init__(self, head_dim: int) -> None:
        self.scale = head_dim**-0.5

    def plan(self, batch: AttentionBatch) -> AttentionBatch:
        return batch

    def run(
        self, plan: AttentionBatch, *, q: torch.Tensor, kv: torch.Tensor, out: torch.Tensor
    ) -> None:
        batch, block = plan, kv.shape[2]
        group = q.shape[1] // kv.shape[3]
        token = 0
        for row, (query_len, kv_len) in enumerate(
            zip(batch.query_lens, batch.kv_lens, strict=True)
        ):
            places = [(int(batch.page_table[row, p // block]), p % block) for p in range(kv_len)]
            keys = torch.stack([kv[page, 0, at] for page, at in places]).float()
            values = torch.stack([kv[page, 1, at] for page, at in places]).float()
            for i in range(query_len):
                seen = kv_len - query_len + i + 1
                for head in range(q.shape[1]):
                    k, v = keys[:seen, head // group], values[:seen, head // group]
                    weights = torch.softmax(k @ q[token, head].float() * self.scale, dim=0)
                    out[token, head] = weights @ v
                token += 1


@dataclass
class RecordedPlan:
    kind: str = "recorded"
    family: str = "none"
    x: torch.Tensor | None = None  # of the last shrink


class RecordingLoRA:
    """LoRAOp that adds nothing and records the groups that it is called for."""

    name = "recording"

    def __init__(self) -> None:
        self.calls: list[tuple[int, LoRAGroup, tuple[int, ...], tuple[int, ...]]] = []

    def shrink(
        self, plan: RecordedPlan, *, x: torch.Tensor, layer: int, group: LoRAGroup, **unused: object
    ) -> None:
        plan.x = x

    def expand(
        self, plan: RecordedPlan, *, y: torch.Tensor, layer: int, group: LoRAGroup, **unused: object
    ) -> None:
        assert plan.x is not None
        self.calls.append((layer, group, tuple(plan.x.shape), tuple(y.shape)))


class PagedSequences:
    """A small pool and the page tables of some sequences. Makes the context of each step.

    Pages are in shuffled order, so that no test passes by luck.
    """

    def __init__(
        self, spec: ModelSpec, num_seqs: int, max_len: int, dtype: torch.dtype = torch.float32
    ) -> None:
        self.block = 4
        per_seq = -(-max_len // self.block)
        num_pages = 1 + num_seqs * per_seq
        page_elems = 2 * self.block * spec.num_kv_heads * spec.head_dim
        self.pool = torch.full((spec.num_layers, num_pages, page_elems), float("nan"), dtype=dtype)
        self.kv = self.pool.view(
            spec.num_layers, num_pages, 2, self.block, spec.num_kv_heads, spec.head_dim
        )
        order = torch.randperm(num_pages - 1, generator=torch.Generator().manual_seed(0)) + 1
        self.page_table = order.view(num_seqs, per_seq).to(torch.int32)
        self.attention = NaiveAttention(spec.head_dim)
        self.lora = RecordingLoRA()
        self.fused = TorchFused(FusedSpec(dtype, torch.device("cpu"), spec.head_dim))

    def context(
        self, starts: list[int], query_lens: list[int], with_lora: bool = False
    ) -> ForwardContext:
        """Sequence b feeds positions starts[b] .. starts[b] + query_lens[b] - 1."""
        positions, rows = [], []
        for b, (start, count) in enumerate(zip(starts, query_lens, strict=True)):
            for p in range(start, start + count):
                page = int(self.page_table[b, p // self.block])
                positions.append(p)
                rows.append(page * 2 * self.block + p % self.block)
        kv_rows = torch.tensor(rows, dtype=torch.int64)
        kv_lens = [start + count for start, count in zip(starts, query_lens, strict=True)]
        batch = AttentionBatch(
            query_lens=np.array(query_lens, dtype=np.int32),
            kv_lens=np.array(kv_lens, dtype=np.int32),
            num_decodes=0,
            page_table=self.page_table.numpy(),
        )
        return ForwardContext(
            positions=torch.tensor(positions, dtype=torch.int64),
            kv_rows=kv_rows,
            pool=self.pool,
            kv=self.kv,
            attention=self.attention,
            attention_plan=self.attention.plan(batch),
            fused=self.fused,
            lora=self.lora,
            lora_plan=RecordedPlan() if with_lora else None,
        )
