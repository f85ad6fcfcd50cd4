"""Every backend of op ``attention`` against the fp32 loop."""

from typing import Any

import pytest
import torch

from loraplex.backends import registry
from loraplex.backends.attention.contract import AttentionBatch, AttentionSpec

from helpers.oracles import attention_oracle

TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
BACKENDS = {backend.name: backend for backend in registry.list_backends("attention")}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

# Rows beyond a sequence's end are memory that the pool has zeroed or that once held finite
# values: a GPU library may multiply them by 0. Our own backend must not touch even NaN there.
TAIL = {"torch": float("nan")}
OTHERS_TAIL = 300.0

Sequences = list[tuple[int, int]]  # (query tokens, context length), decode rows first

BATCHES: dict[str, Sequences] = {
    "one-token": [(1, 1)],
    "decode": [(1, 5), (1, 1), (1, 16), (1, 17), (1, 64), (1, 65), (1, 130)],
    "decode-equal": [(1, 33)] * 5,
    "prefill": [(7, 7), (1, 1), (33, 33), (130, 130)],
    "prefill-cached": [(5, 37), (16, 48), (1, 64), (70, 200)],
    "mixed": [(1, 40), (1, 3), (1, 129), (12, 12), (1, 90), (31, 95), (3, 3)],
}
HEADS = {"mha": (4, 4), "gqa": (6, 2), "mqa": (4, 1)}


def _make_spec(
    dtype: torch.dtype, device: str, heads: tuple[int, int], *, head_dim: int, block_tokens: int
) -> AttentionSpec:
    return AttentionSpec(
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        block_tokens=block_tokens,
        scale=head_dim**-0.5 * 1.3,
        dtype=dtype,
        device=torch.device(device),
    )


def _make_op(name: str, spec: AttentionSpec) -> Any:
    reason = BACKENDS[name].probe(spec)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return BACKENDS[name].make(spec)


def _make_batch(
    sequences: Sequences, spec: AttentionSpec, spare_columns: int
) -> tuple[AttentionBatch, int]:
    """Shuffled pages, none shared, page 0 unused; and the number of pages of the pool."""
    block = spec.block_tokens
    counts = [-(-kv_len // block) for _, kv_len in sequences]
    num_pages = sum(counts) + 4
    free = (torch.randperm(num_pages - 1, generator=torch.Generator().manual_seed(3)) + 1).tolist()
    table = torch.zeros(len(sequences), max(counts) + spare_columns, dtype=torch.int32)
    rows, starts = [], [0]
    num_decodes = 0
    for b, (query_len, kv_len) in enumerate(sequences):
        table[b, : counts[b]] = torch.tensor([free.pop() for _ in range(counts[b])])
        for position in range(kv_len - query_len, kv_len):
            page = int(table[b, position // block])
            rows.append(page * 2 * block + position % block)
        starts.append(starts[-1] + query_len)
        num_decodes += query_len == 1 and num_decodes == b
    device = spec.device
    batch = AttentionBatch(
        query_lens=tuple(query_len for query_len, _ in sequences),
        kv_lens=tuple(kv_len for _, kv_len in sequences),
        num_decodes=num_decodes,
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        kv_lens_device=torch.tensor([n for _, n in sequences], dtype=torch.int32, device=device),
        page_table=table.to(device),
        kv_rows=torch.tensor(rows, dtype=torch.int64, device=device),
    )
    return batch, num_pages


def _make_kv(
    batch: AttentionBatch, num_pages: int, spec: AttentionSpec, tail: float
) -> torch.Tensor:
    """Pages nobody owns are NaN, rows beyond a sequence's end are `tail`."""
    shape = (num_pages, 2, spec.block_tokens, spec.num_kv_heads, spec.head_dim)
    kv = torch.full(shape, float("nan"))
    generator = torch.Generator().manual_seed(4)
    for b, kv_len in enumerate(batch.kv_lens):
        for start in range(0, kv_len, spec.block_tokens):
            page = int(batch.page_table[b, start // spec.block_tokens])
            used = min(spec.block_tokens, kv_len - start)
            kv[page] = tail
            kv[page, :, :used] = torch.randn(kv[page, :, :used].shape, generator=generator)
    kv[0] = kv[0].nan_to_num(tail)  # the null page pads tables
    return kv.to(spec.dtype).to(spec.device)


def _check(name: str, spec: AttentionSpec, *batches: Sequences, spare_columns: int = 0) -> None:
    op = _make_op(name, spec)
    for sequences in batches:
        batch, num_pages = _make_batch(sequences, spec, spare_columns)
        kv = _make_kv(batch, num_pages, spec, TAIL.get(name, OTHERS_TAIL))
        num_tokens = sum(batch.query_lens)
        shape = (num_tokens, spec.num_heads, spec.head_dim)
        generator = torch.Generator().manual_seed(6)
        q = torch.randn(shape, generator=generator).to(spec.dtype).to(spec.device)
        out = torch.full_like(q, float("nan"))
        before = kv.clone()
        op.plan(batch)
        op.run(q=q, kv=kv, out=out)
        again = torch.full_like(q, float("nan"))
        op.run(q=q, kv=kv, out=again)
        want = attention_oracle(q, kv, spec, batch)
        error = (out.float().cpu() - want).abs().max()
        assert error < TOLERANCE[spec.dtype] * max(1.0, float(want.abs().max()))
        assert torch.equal(out, again)
        assert torch.equal(kv.nan_to_num(9.0), before.nan_to_num(9.0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("sequences", BATCHES)
@pytest.mark.parametrize("name", BACKENDS)
def test_batches(name: str, sequences: str, heads: str, dtype: torch.dtype, device: str) -> None:
    if device == "cpu" and dtype != torch.float32 and sequences != "mixed":
        pytest.skip("on a CPU one batch shows the other types")
    spec = _make_spec(dtype, device, HEADS[heads], head_dim=64, block_tokens=16)
    _check(name, spec, BATCHES[sequences])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("block_tokens", [1, 4, 16, 64, 128])
@pytest.mark.parametrize("name", BACKENDS)
def test_page_sizes(name: str, block_tokens: int, head_dim: int, device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    spec = _make_spec(dtype, device, (4, 2), head_dim=head_dim, block_tokens=block_tokens)
    _check(name, spec, BATCHES["mixed"], BATCHES["decode"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BACKENDS)
def test_wide_page_tables_and_replanning(name: str, device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.float16
    spec = _make_spec(dtype, device, (4, 2), head_dim=64, block_tokens=16)
    _check(name, spec, BATCHES["mixed"], [(1, 8)], BATCHES["prefill"], spare_columns=9)


@pytest.mark.parametrize("name", BACKENDS)
def test_long_prefill_in_pieces(name: str) -> None:
    """Longer than one chunk of queries, and a gather that takes several calls."""
    spec = _make_spec(torch.float32, "cpu", (2, 1), head_dim=32, block_tokens=16)
    _check(name, spec, [(1, 300), (520, 530), (258, 258)])


def test_decodes_split_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from loraplex.backends.attention import torch_sdpa

    monkeypatch.setattr(torch_sdpa, "MAX_GATHER_ELEMS", 2 * 64 * 130)
    spec = _make_spec(torch.float32, "cpu", (4, 2), head_dim=64, block_tokens=16)
    _check("torch", spec, BATCHES["decode"], BATCHES["mixed"])


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(32, 8), (32, 32)])
@pytest.mark.parametrize("block_tokens", [16, 64])
@pytest.mark.parametrize("num_sequences", [1, 64, 256])
@pytest.mark.parametrize("name", BACKENDS)
def test_full_size_decode(
    name: str, num_sequences: int, block_tokens: int, heads: tuple[int, int]
) -> None:
    """Sizes at which libraries have been seen to read out of bounds; judged by PyTorch's SDPA."""
    spec = _make_spec(torch.bfloat16, "cuda", heads, head_dim=128, block_tokens=block_tokens)
    op = _make_op(name, spec)
    lengths = [400 - (i % 7) for i in range(num_sequences)]
    batch, num_pages = _make_batch([(1, n) for n in lengths], spec, 0)
    shape = (num_pages, 2, block_tokens, heads[1], 128)
    kv = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    q = torch.randn(num_sequences, heads[0], 128, dtype=torch.bfloat16, device="cuda")
    out = torch.full_like(q, float("nan"))
    op.plan(batch)
    op.run(q=q, kv=kv, out=out)
    torch.cuda.synchronize()
    for b, length in enumerate(lengths):
        pages = batch.page_table[b, : -(-length // block_tokens)].long()
        k, v = (kv[pages, i].flatten(0, 1)[:length].float().transpose(0, 1) for i in (0, 1))
        want = torch.nn.functional.scaled_dot_product_attention(
            q[b, :, None].float()[None], k[None], v[None], scale=spec.scale, enable_gqa=True
        )
        assert (out[b].float() - want[0, :, 0]).abs().max() < 0.02
