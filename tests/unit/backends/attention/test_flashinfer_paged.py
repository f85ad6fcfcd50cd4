"""Arguments that backend ``flashinfer`` passes to its library, on a CPU. A loop stands in for the
kernels."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from loraplex.backends.attention.contract import AttentionBatch, AttentionSpec
from loraplex.backends.attention.flashinfer import attention as flashinfer_paged
from loraplex.backends.attention.flashinfer import jit as flashinfer_jit
from loraplex.backends.attention.flashinfer import modules as flashinfer_modules
from loraplex.backends.attention.flashinfer.attention import FlashInferAttention
from loraplex.backends.attention.flashinfer.modules import Workspace
from loraplex.backends.attention.paged_rows import PagedRows, paged_rows

from helpers.kernels.attention_cases import BATCHES, make_batch, make_kv, make_spec, random_decodes
from helpers.kernels.oracles import attention_oracle

NUM_SMS = 132


class LoopModule:
    """Attends to rows in the library's format, and checks the scratch memory a plan would use."""

    def __init__(self, spec: AttentionSpec, kind: str, causal: bool) -> None:
        self.spec, self.kind, self.causal = spec, kind, causal
        self.addresses: dict[int, tuple[int, ...]] = {}
        self.num_plans = 0
        self.static = 0
        self.num_splits = 1

    def plan(self, workspace: Workspace, rows: PagedRows, *, for_graph: bool) -> list[int]:
        if not self.causal:
            self._check_decode_scratch(workspace, rows)
        # Like the library it writes the plan to `ints`, whose address a graph keeps.
        self.num_plans += 1
        workspace.ints[:4].view(torch.int32)[0] = self.num_plans
        if for_graph:
            assert self.static in (0, workspace.ints.data_ptr())
            self.static = workspace.ints.data_ptr()
        else:
            assert workspace.ints.data_ptr() != self.static
        return [len(rows.kv_lens), self.num_splits, 0 if for_graph else self.num_plans]

    def _check_decode_scratch(self, workspace: Workspace, rows: PagedRows) -> None:
        """The sizes that the library's planner takes in a graph on a GPU of 132 multiprocessors."""
        spec, num_rows = self.spec, len(rows.kv_lens)
        group = spec.num_heads // spec.num_kv_heads
        if self.kind == "cuda-cores":
            tiles, tile = 16 * NUM_SMS // spec.num_kv_heads, 1
        else:
            tile = 16 if group <= 16 else 64 if group <= 64 else 128
            tiles = max(
                2 * NUM_SMS // spec.num_kv_heads, -(-num_rows * group // tile) + num_rows - 1
            )
        floats = spec.num_heads * tiles * tile * (spec.head_dim + 1) * 4
        assert workspace.floats.numel() >= floats
        assert workspace.ints.numel() >= 13 * tiles + 8 * (num_rows + 2) + 256

    def run(
        self,
        workspace: Workspace,
        plan_info: list[int],
        rows: dict[str, torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        starts, page_starts = rows["query_starts"].tolist(), rows["page_starts"].tolist()
        num_rows, _, number = plan_info
        assert num_rows == len(rows["last_page_lens"]) and starts[-1] == q.shape[0]
        if number:
            assert workspace.ints[:4].view(torch.int32).item() == number, "another plan lies there"
        else:  # of a graph
            now = tuple(tensor.data_ptr() for tensor in rows.values())
            assert self.addresses.setdefault(num_rows, now) == now
        for b, last_page_len in enumerate(rows["last_page_lens"].tolist()):
            pages = rows["page_ids"][page_starts[b] : page_starts[b + 1]].long()
            kv_len = (len(pages) - 1) * k.shape[1] + last_page_len
            keys, values = (
                cache[pages]
                .flatten(0, 1)[:kv_len]
                .repeat_interleave(q.shape[1] // cache.shape[2], dim=1)
                for cache in (k, v)
            )
            for i, token in enumerate(range(starts[b], starts[b + 1])):
                seen = kv_len - (starts[b + 1] - starts[b]) + i + 1 if self.causal else kv_len
                scores = torch.einsum("hd,lhd->hl", q[token], keys[:seen]) * self.spec.scale
                out[token] = torch.einsum("hl,lhd->hd", scores.softmax(-1), values[:seen])


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[LoopModule]:
    modules: list[LoopModule] = []

    def make(spec: AttentionSpec, kind: str, *, causal: bool) -> LoopModule:
        modules.append(LoopModule(spec, kind, causal))
        return modules[-1]

    monkeypatch.setattr(flashinfer_paged, "make_module", make)
    monkeypatch.setattr(flashinfer_paged, "num_multiprocessors", lambda spec: NUM_SMS)
    return modules


def _queries(num_tokens: int, spec: AttentionSpec) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(num_tokens, spec.num_heads, spec.head_dim, generator=generator)


@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("block_tokens", [1, 16])
def test_eager_steps(made: Any, heads: tuple[int, int], block_tokens: int) -> None:
    spec = make_spec(torch.float32, "cpu", heads, head_dim=16, block_tokens=block_tokens)
    op = FlashInferAttention(spec, "fa2")
    assert [m.kind for m in made] == ["cuda-cores" if heads == (4, 4) else "fa2", "fa2"]
    for sequences in BATCHES.values():
        batch, num_pages = make_batch(sequences, spec)
        kv = make_kv(batch, num_pages, spec, float("nan"))
        q = _queries(int(batch.query_lens.sum()), spec)
        out = torch.full_like(q, float("nan"))
        plan = op.plan(batch)
        op.run(plan, q=q, kv=kv, out=out)
        assert torch.allclose(out, attention_oracle(q, kv, spec, batch), atol=2e-5)


def test_layers_and_pools_are_told_apart(made: Any) -> None:
    spec = make_spec(torch.float32, "cpu", (4, 2), head_dim=16)
    op = FlashInferAttention(spec, "fa2")
    batch, num_pages = make_batch(BATCHES["mixed"], spec)
    plan = op.plan(batch)
    q = _queries(int(batch.query_lens.sum()), spec)
    for _ in range(3):
        pool = torch.randn(3, num_pages, 2, 16, 2, 16)
        for layer in (0, 2, 1, 0, 2):
            pool[layer] += 1
            out = torch.full_like(q, float("nan"))
            op.run(plan, q=q, kv=pool[layer], out=out)
            assert torch.allclose(out, attention_oracle(q, pool[layer], spec, batch), atol=2e-5)


def test_plans_keep_their_own_memory(made: Any) -> None:
    """Eager plans run in turn, beside a graph's, and their buffers are used again once dropped."""
    spec = make_spec(torch.float32, "cpu", (8, 2), head_dim=16)
    op = FlashInferAttention(spec, "fa2")
    steps = []
    for sequences in ("mixed", "decode", "prefill"):
        batch, num_pages = make_batch(BATCHES[sequences], spec)
        kv = make_kv(batch, num_pages, spec, float("nan"))
        steps.append((op.plan(batch), batch, kv, _queries(int(batch.query_lens.sum()), spec)))
    op.plan_graph(random_decodes(np.random.default_rng(1), spec, 3, 30), 4)
    for index in (0, 1, 2, 1, 0):
        plan, batch, kv, q = steps[index]
        out = torch.full_like(q, float("nan"))
        op.run(plan, q=q, kv=kv, out=out)
        assert torch.allclose(out, attention_oracle(q, kv, spec, batch), atol=2e-5)
    del plan
    num_bytes = op.workspace_bytes
    steps = [(None, batch, kv, q) for _, batch, kv, q in steps]
    for _, batch, _, _ in steps * 2:
        op.plan(batch)
    assert op.workspace_bytes == num_bytes


def test_graph_steps_keep_their_places(made: Any) -> None:
    spec = make_spec(torch.float32, "cpu", (8, 2), head_dim=16, max_num_seqs=8, max_len=100)
    op = FlashInferAttention(spec, "fa2")
    kv = torch.randn(30, 2, 16, 2, 16)
    kv[-1] = float("nan")
    rng = np.random.default_rng(1)
    for num_rows, num_seqs in [(8, 8), (4, 1), (8, 3), (1, 1), (4, 4), (8, 8), (4, 0)]:
        batch = random_decodes(rng, spec, num_seqs, 30)
        q = _queries(num_rows, spec)
        out = torch.full_like(q, float("nan"))
        plan = op.plan_graph(batch, num_rows)
        op.run(plan, q=q, kv=kv, out=out)
        want = attention_oracle(q[:num_seqs], kv, spec, batch)
        assert torch.allclose(out[:num_seqs], want, atol=2e-5)
        assert torch.allclose(out[num_seqs:], kv[0, 1, 0].repeat_interleave(4, 0), atol=2e-5)
    assert set(made[0].addresses) == {8, 4, 1}


def test_a_plan_that_no_captured_graph_fits_is_an_error(made: Any) -> None:
    spec = make_spec(torch.float32, "cpu", (8, 2), max_num_seqs=8)
    op = FlashInferAttention(spec, "fa2")
    batch = random_decodes(np.random.default_rng(1), spec, 3, 30)
    op.plan_graph(batch, 4)
    made[0].num_splits = 2
    op.plan_graph(batch, 8)
    with pytest.raises(RuntimeError, match="plans 4 rows otherwise"):
        op.plan_graph(batch, 4)


def test_what_graphs_cannot_hold(made: Any) -> None:
    spec = make_spec(torch.float32, "cpu", (8, 2), max_num_seqs=8)
    op = FlashInferAttention(spec, "fa2")
    batch, _ = make_batch(BATCHES["mixed"], spec)
    with pytest.raises(ValueError, match="CUDA graphs are for decodes: 4 sequences prefill"):
        op.plan_graph(batch, 8)
    decodes, _ = make_batch(BATCHES["decode"], spec)
    for num_rows in (6, 9):
        with pytest.raises(ValueError, match=f"7 sequences do not fit {num_rows} rows"):
            op.plan_graph(decodes, num_rows)


@pytest.mark.parametrize("heads", [(32, 8), (32, 32), (32, 1), (71, 1)], ids=str)
@pytest.mark.parametrize("max_num_seqs", [1, 256])
def test_scratch_holds_the_largest_plan(made: Any, heads: Any, max_num_seqs: int) -> None:
    spec = make_spec(torch.float32, "cpu", heads, head_dim=16, max_num_seqs=max_num_seqs)
    op = FlashInferAttention(spec, "fa2")
    batch = random_decodes(np.random.default_rng(2), spec, max_num_seqs, 50)
    op.plan_graph(batch, max_num_seqs)
    assert op.workspace_bytes > spec.max_pages * max_num_seqs * 4


def test_a_narrow_table_is_refused() -> None:
    spec = make_spec(torch.float32, "cpu", (4, 2))
    batch, _ = make_batch([(1, 20), (1, 64)], spec, spare_columns=0)
    narrow = AttentionBatch(batch.query_lens, batch.kv_lens, 2, batch.page_table[:, :3])
    with pytest.raises(ValueError, match="has 3 columns, the longest sequence has 4 pages"):
        paged_rows(narrow, 0, 2, spec.block_tokens)


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, made: Any) -> None:
    spec = make_spec(torch.float16, "cpu", (4, 2))
    jit_spec = SimpleNamespace(name="kernels_x", is_aot=False, aot_path=tmp_path / "x.so")
    monkeypatch.setattr(flashinfer_jit, "jit_spec", lambda spec, kind: jit_spec)
    monkeypatch.setattr(flashinfer_jit.shutil, "which", lambda tool: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    reason = flashinfer_jit.missing_reason(spec, "fa2")
    assert reason is not None and "nvcc and ninja must be on PATH" in reason
    assert "kernels_x" in reason and str(tmp_path / "x.so") in reason
    jit_spec.is_aot = True
    assert flashinfer_jit.missing_reason(spec, "fa2") is None


def test_a_failed_build_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec(torch.float16, "cpu", (4, 2))
    jit_spec = SimpleNamespace(name="kernels_y", is_compiled=False, is_aot=False)
    monkeypatch.setattr(flashinfer_jit, "jit_spec", lambda spec, kind: jit_spec)
    monkeypatch.setattr(flashinfer_modules, "jit_spec", lambda spec, kind: jit_spec)
    monkeypatch.setattr(flashinfer_jit, "build_errors", errors := {})
    monkeypatch.setattr(flashinfer_modules, "build_errors", errors)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("curand.h: no such file")

    monkeypatch.setattr(flashinfer_modules, "PrefillModule", fail)
    with pytest.raises(RuntimeError, match="curand"):
        flashinfer_modules.make_module(spec, "fa3", causal=True)
    reason = flashinfer_jit.missing_reason(spec, "fa3")
    assert reason is not None and "kernels_y do not build: curand.h" in reason
