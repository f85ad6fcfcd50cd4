"""The oracles of all backends: plain loops in fp32."""

import torch

from loraplex.backends.attention.contract import AttentionBatch, AttentionSpec
from loraplex.backends.lora.contract import LoRAGroup


def lora_oracle(
    y: torch.Tensor,
    x: torch.Tensor,
    group: LoRAGroup,
    slots: list[int],
    weights: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, float]],
) -> torch.Tensor:
    """Returns the expected y in fp32, computed for one adapter and one module at a time.

    Args:
        slots: the adapter slot of each row, -1 for the base model; y may have more rows.
        weights: (adapter slot, module) to A [rank, in], B [out, rank] and scale, of this layer,
            as they were before they went into pages.
    """
    want = y.float()
    of_row = torch.tensor(slots, device=y.device)
    for slot in sorted({slot for slot in slots if slot >= 0}):
        rows = (of_row == slot).nonzero().flatten()
        x32 = x[rows].float()
        columns = zip(group.modules, group.out_starts, group.out_features, strict=True)
        for module, start, width in columns:
            if (slot, module) in weights:
                a, b, scale = weights[slot, module]
                delta = (x32 @ a.float().T) @ b.float().T
                want[rows, start : start + width] += scale * delta
    return want


def attention_oracle(
    q: torch.Tensor, kv: torch.Tensor, spec: AttentionSpec, batch: AttentionBatch
) -> torch.Tensor:
    """Returns the expected out [T, num_heads, head_dim] in fp32. Reads only visible positions."""
    out = torch.zeros(q.shape, dtype=torch.float32)
    kv32, group = kv.float().cpu(), spec.num_heads // spec.num_kv_heads
    table = torch.from_numpy(batch.page_table)
    token = 0
    for b, (query_len, kv_len) in enumerate(zip(batch.query_lens, batch.kv_lens, strict=True)):
        positions = torch.arange(kv_len)
        pages = table[b, positions // spec.block_tokens].long()
        k = kv32[pages, 0, positions % spec.block_tokens]
        v = kv32[pages, 1, positions % spec.block_tokens]
        for i in range(query_len):
            seen = kv_len - query_len + i + 1
            for head in range(spec.num_heads):
                scores = k[:seen, head // group] @ q[token, head].float().cpu() * spec.scale
                out[token, head] = torch.softmax(scores, dim=0) @ v[:seen, head // group]
            token += 1
    return out
