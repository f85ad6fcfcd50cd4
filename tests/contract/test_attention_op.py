"""Every backend of op ``attention`` against the fp32 loop."""

from typing import Any

import numpy as np
import pytest
import torch

from loraplex.backends import registry
from loraplex.backends.attention.contract import AttentionSpec, GraphsUnsupportedError

from helpers.kernels.attention_cases import (
    BATCHES,
    GraphRunner,
    Sequences,
    make_batch,
    make_kv,
    make_spec,
    random_decodes,
)
from helpers.kernels.oracles import attention_oracle

TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
BACKENDS = {backend.name: backend for backend in registry.list_backends("attention")}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

# Rows beyond a sequence's end are memory that the pool has zeroed or that once held finite
# values: a GPU library may multiply them by 0. Our own backend must not touch even NaN there.
TAIL = {"torch": float("nan")}
OTHERS_TAIL = 300.0

HEADS = {"mha": (4, 4), "gqa": (6, 2), "mqa": (4, 1)}


def _make_op(name: str, spec: AttentionSpec) -> Any:
    reason = BACKENDS[name].probe(spec)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return BACKENDS[name].make(spec)


def _make_graph_op(name: str, spec: AttentionSpec) -> Any:
    op = _make_op(name, spec)
    if not op.supports_graphs:
        pytest.skip(f"{name} does not run in graphs")
    return op


def _check(
    name: str,
    spec: AttentionSpec,
    *batches: Sequences,
    spare_columns: int = 2,
    tail: float | None = None,
) -> None:
    op = _make_op(name, spec)
    tail = TAIL.get(name, OTHERS_TAIL) if tail is None else tail
    for sequences in batches:
        batch, num_pages = make_batch(sequences, spec, spare_columns=spare_columns)
        kv = make_kv(batch, num_pages, spec, tail)
        shape = (int(batch.query_lens.sum()), spec.num_heads, spec.head_dim)
        generator = torch.Generator().manual_seed(6)
        q = torch.randn(shape, generator=generator).to(spec.dtype).to(spec.device)
        out = torch.full_like(q, float("nan"))
        before = kv.clone()
        plan = op.plan(batch)
        op.run(plan, q=q, kv=kv, out=out)
        again = torch.full_like(q, float("nan"))
        op.run(plan, q=q, kv=kv, out=again)
        want = attention_oracle(q, kv, spec, batch)
        error = (out.float().cpu() - want).abs().max()
        assert error < TOLERANCE[spec.dtype] * max(1.0, float(want.abs().max()))
        assert torch.equal(out, again)
        assert torch.equal(kv.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("sequences", BATCHES)
@pytest.mark.parametrize("name", BACKENDS)
def test_batches(name: str, sequences: str, heads: str, dtype: torch.dtype, device: str) -> None:
    if device == "cpu" and dtype != torch.float32 and sequences != "mixed":
        pytest.skip("on a CPU one batch shows the other types")
    spec = make_spec(dtype, device, HEADS[heads], head_dim=64, block_tokens=16)
    _check(name, spec, BATCHES[sequences])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_pages_in_e4m3(name: str, heads: tuple[int, int], device: str) -> None:
    """Rows beyond a sequence's end are NaN: such a page may have held an adapter, whose bytes are
    any numbers of e4m3."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    spec = make_spec(dtype, device, heads, head_dim=128, kv_dtype=torch.float8_e4m3fn)
    batches = (BATCHES[name] for name in ("mixed", "decode", "prefill-cached"))
    _check(name, spec, *batches, tail=float("nan"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("block_tokens", [1, 4, 16, 64, 128])
@pytest.mark.parametrize("name", BACKENDS)
def test_page_sizes(name: str, block_tokens: int, head_dim: int, device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    spec = make_spec(dtype, device, (4, 2), head_dim=head_dim, block_tokens=block_tokens)
    _check(name, spec, BATCHES["mixed"], BATCHES["decode"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BACKENDS)
def test_wide_page_tables_and_replanning(name: str, device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.float16
    spec = make_spec(dtype, device, (4, 2), head_dim=64, block_tokens=16)
    _check(name, spec, BATCHES["mixed"], [(1, 8)], BATCHES["prefill"], spare_columns=9)
    _check(name, spec, BATCHES["decode"], BATCHES["mixed"], spare_columns=0)


@pytest.mark.parametrize("name", BACKENDS)
def test_long_prefill_in_pieces(name: str) -> None:
    """Longer than one chunk of queries, and a gather that takes several calls."""
    spec = make_spec(torch.float32, "cpu", (2, 1), head_dim=32, block_tokens=16)
    _check(name, spec, [(1, 300), (520, 530), (258, 258)])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BACKENDS)
def test_plans_are_independent(name: str, device: str) -> None:
    """Two eager plans are alive at one time and run in turn; a third is made between."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    spec = make_spec(dtype, device, (4, 2), head_dim=64, block_tokens=16)
    op = _make_op(name, spec)
    steps = []
    for seed, sequences in enumerate(("mixed", "decode", "prefill-cached")):
        batch, num_pages = make_batch(BATCHES[sequences], spec)
        kv = make_kv(batch, num_pages, spec, TAIL.get(name, OTHERS_TAIL))
        shape = (int(batch.query_lens.sum()), spec.num_heads, spec.head_dim)
        q = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        q = q.to(dtype).to(device)
        steps.append((batch, kv, q, attention_oracle(q, kv, spec, batch)))
    plans = [op.plan(batch) for batch, *_ in steps[:2]]
    for index in (0, 1, 0, 2, 1, 0):
        batch, kv, q, want = steps[index]
        if index == len(plans):
            plans.append(op.plan(batch))
            if op.supports_graphs:
                op.plan_graph(random_decodes(np.random.default_rng(1), spec, 3, 20), 4)
        out = torch.full_like(q, float("nan"))
        op.run(plans[index], q=q, kv=kv, out=out)
        error = (out.float().cpu() - want).abs().max()
        assert error < TOLERANCE[dtype] * max(1.0, float(want.abs().max()))


def test_decodes_split_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from loraplex.backends.attention import torch_sdpa

    monkeypatch.setattr(torch_sdpa, "MAX_GATHER_ELEMS", 2 * 64 * 130)
    spec = make_spec(torch.float32, "cpu", (4, 2), head_dim=64, block_tokens=16)
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
    spec = make_spec(
        torch.bfloat16, "cuda", heads, head_dim=128, block_tokens=block_tokens, max_num_seqs=256
    )
    op = _make_op(name, spec)
    lengths = [400 - (i % 7) for i in range(num_sequences)]
    batch, num_pages = make_batch([(1, n) for n in lengths], spec, spare_columns=0)
    shape = (num_pages, 2, block_tokens, heads[1], 128)
    kv = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    q = torch.randn(num_sequences, heads[0], 128, dtype=torch.bfloat16, device="cuda")
    out = torch.full_like(q, float("nan"))
    plan = op.plan(batch)
    op.run(plan, q=q, kv=kv, out=out)
    torch.cuda.synchronize()
    for b, length in enumerate(lengths):
        pages = torch.from_numpy(batch.page_table[b, : -(-length // block_tokens)]).long().cuda()
        k, v = (kv[pages, i].flatten(0, 1)[:length].float().transpose(0, 1) for i in (0, 1))
        want = torch.nn.functional.scaled_dot_product_attention(
            q[b, :, None].float()[None], k[None], v[None], scale=spec.scale, enable_gqa=True
        )
        assert (out[b].float() - want[0, :, 0]).abs().max() < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
def test_strided_queries(name: str) -> None:
    """q as a view of the fused projection's output."""
    spec = make_spec(torch.bfloat16, "cuda", (8, 2), head_dim=128)
    op = _make_op(name, spec)
    batch, num_pages = make_batch(BATCHES["mixed"], spec)
    kv = make_kv(batch, num_pages, spec, OTHERS_TAIL)
    num_tokens = int(batch.query_lens.sum())
    fused = torch.randn(num_tokens, 12 * 128, device="cuda").to(spec.dtype)
    q = fused[:, : 8 * 128].view(num_tokens, 8, 128)
    out = torch.empty(num_tokens, 8, 128, dtype=spec.dtype, device="cuda")
    plan = op.plan(batch)
    op.run(plan, q=q, kv=kv, out=out)
    want = attention_oracle(q, kv, spec, batch)
    assert (out.float().cpu() - want).abs().max() < TOLERANCE[spec.dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BACKENDS)
def test_backends_without_graphs_say_so(name: str, device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.float16
    spec = make_spec(dtype, device, (4, 2))
    op = _make_op(name, spec)
    batch = random_decodes(np.random.default_rng(1), spec, 3, 20)
    if op.supports_graphs:
        op.plan_graph(batch, 4)
        for num_rows in (2, spec.max_num_seqs + 1):
            with pytest.raises(ValueError, match="do not fit"):
                op.plan_graph(batch, num_rows)
    else:
        with pytest.raises(GraphsUnsupportedError, match=name):
            op.plan_graph(batch, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (8, 2), (8, 1)], ids=str)
@pytest.mark.parametrize("block_tokens", [16, 64])
@pytest.mark.parametrize("name", BACKENDS)
def test_graph_replays(
    name: str, block_tokens: int, heads: tuple[int, int], kv_dtype: torch.dtype | None
) -> None:
    """Captured once a number of rows, then other lengths, tables and fewer rows, in any order, with
    eager steps between."""
    spec = make_spec(
        torch.bfloat16, "cuda", heads, head_dim=128, block_tokens=block_tokens, kv_dtype=kv_dtype
    )
    op = _make_graph_op(name, spec)
    runner = GraphRunner(op, spec, (64, 8, 4, 1))
    rng = np.random.default_rng(7)
    for num_rows in (1, 4, 8, 64, 4, 64, 1, 8):
        num_seqs = num_rows if rng.random() < 0.5 else int(rng.integers(1, num_rows + 1))
        batch = random_decodes(rng, spec, num_seqs, runner.num_pages)
        got = runner.replay(batch, num_rows)
        _check_rows(got, runner, batch)
        plan = op.plan(batch)
        eager = torch.zeros_like(got)
        op.run(plan, q=runner.q[:num_seqs], kv=runner.kv, out=eager[:num_seqs])
        _check_rows(eager, runner, batch)


def _check_rows(got: torch.Tensor, runner: GraphRunner, batch: Any) -> None:
    num_seqs = len(batch.kv_lens)
    want = attention_oracle(runner.q[:num_seqs], runner.kv, runner.spec, batch)
    error = (got[:num_seqs].float().cpu() - want).abs().max()
    assert error < TOLERANCE[runner.spec.dtype] * max(1.0, float(want.abs().max()))
    assert got.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_plans_run_ahead_of_the_gpu(name: str, heads: tuple[int, int]) -> None:
    """Plans and replays queued while the GPU is busy: no plan may change an earlier step."""
    spec = make_spec(torch.bfloat16, "cuda", heads, head_dim=128)
    runner = GraphRunner(_make_graph_op(name, spec), spec, (16, 8))
    rng = np.random.default_rng(8)
    steps = [
        (random_decodes(rng, spec, int(rng.integers(1, num_rows + 1)), runner.num_pages), num_rows)
        for num_rows in (16, 8) * 12
    ]
    results = []
    for batch, num_rows in steps:
        torch.cuda._sleep(5_000_000)  # cycles, a few milliseconds: the CPU is always ahead
        results.append(runner.replay(batch, num_rows))
    for (batch, _), got in zip(steps, results, strict=True):
        _check_rows(got, runner, batch)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_plans_do_not_wait_for_the_gpu(name: str, heads: tuple[int, int]) -> None:
    spec = make_spec(torch.bfloat16, "cuda", heads, head_dim=128)
    op = _make_graph_op(name, spec)
    runner = GraphRunner(op, spec, (16,))
    decodes = random_decodes(np.random.default_rng(9), spec, 16, runner.num_pages)
    mixed, num_pages = make_batch(BATCHES["mixed"], spec)
    kv = make_kv(mixed, num_pages, spec, OTHERS_TAIL)
    q = torch.randn(int(mixed.query_lens.sum()), *runner.q.shape[1:], device="cuda").bfloat16()
    out = torch.empty_like(q)
    for _ in range(5):  # every pinned buffer has grown
        runner.replay(decodes, 16)
        plan = op.plan(mixed)
        op.run(plan, q=q, kv=kv, out=out)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # cycles, about a second
    done.record()
    runner.replay(decodes, 16)
    plan = op.plan(mixed)
    op.run(plan, q=q, kv=kv, out=out)
    assert not done.query()
    want = attention_oracle(q, kv, spec, mixed)
    assert (out.float().cpu() - want).abs().max() < TOLERANCE[spec.dtype]
