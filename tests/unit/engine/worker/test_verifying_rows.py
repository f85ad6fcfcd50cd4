"""Rows that verify drafts: their arrays, and what a worker samples after each draft."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loraplex.backends.attention.contract import one_row_a_token
from loraplex.backends.attention.torch_sdpa import TorchAttention
from loraplex.engine.config import EngineConfig, GraphConfig, ModelConfig
from loraplex.engine.worker import model_runner
from loraplex.engine.worker.step_rows import draft_places, make_rows, masks_by_row
from loraplex.engine.worker.worker import Worker
from loraplex.memory.config import MemoryConfig
from loraplex.scheduler.config import SchedulerConfig
from loraplex.scheduler.worker_protocol import StepPlan, StepResult, int_array

from helpers.fakes.fake_graphs import FakeRecorder, allow_graphs
from helpers.kernels.attention_cases import BATCHES, make_batch, make_kv, make_spec
from helpers.models.hf_models import make_hf_model
from helpers.models.peft_adapters import make_adapter
from helpers.running.step_driver import Sequence, StepDriver

EMPTY = int_array()


def test_each_sampled_token_knows_its_row_and_place() -> None:
    """One row decodes, one prefills without sampling, two verify 2 drafts and 1."""
    plan = StepPlan(
        0, EMPTY, [], EMPTY, EMPTY,
        slots=int_array([4, 0, 2, 1]), positions=int_array([9, 0, 5, 7]),
        num_tokens=int_array([1, 3, 3, 2]), samples=int_array([1, 0, 3, 2]),
        masked_rows=int_array([2]), masks=int_array([70, 71, 72]), draft_ids=int_array([8, 9, 6]),
    )  # fmt: skip
    rows = make_rows(plan)
    assert rows.sampling.tolist() == [0, 2, 2, 2, 3, 3]
    assert rows.sampled_after.tolist() == [0, 4, 5, 6, 7, 8]
    assert rows.next_positions.tolist() == [10, 6, 7, 8, 8, 9]
    assert draft_places(plan, 100).tolist() == [206, 207, 108]
    masks = masks_by_row(rows, plan.masked_rows, plan.masks)
    assert {place: mask.tolist() for place, mask in masks.items()} == {1: [70], 2: [71], 3: [72]}
    assert not rows.is_decode
    only = make_rows(StepPlan(0, EMPTY, [], EMPTY, EMPTY, *(int_array([n]) for n in (4, 9, 3, 3))))
    assert only.is_decode and only.num_reread == 2 * 12


@pytest.mark.parametrize("name", BATCHES)
def test_a_row_for_each_token_attends_to_the_same(name: str) -> None:
    spec = make_spec(torch.float32, "cpu", (4, 2))
    batch, num_pages = make_batch(BATCHES[name], spec)
    kv = make_kv(batch, num_pages, spec, tail=0.5)
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(int(batch.query_lens.sum()), 4, spec.head_dim, generator=generator)
    op = TorchAttention(spec)
    outs = []
    for some in (batch, one_row_a_token(batch)):
        outs.append(torch.full_like(q, torch.nan))
        op.run(op.plan(some), q=q, kv=kv, out=outs[-1])
    torch.testing.assert_close(outs[1], outs[0])
    assert np.all(one_row_a_token(batch).query_lens == 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("verifying")
    model = make_hf_model("llama", root / "base", seed=3, num_hidden_layers=2)
    make_adapter(model, root / "a", seed=5, r=8, alpha=16, targets="all-linear")
    return root


@pytest.fixture
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How rows with drafts run. CUDA graphs are faked."""
    name: str = request.param
    if name != "eager":
        allow_graphs(monkeypatch, FakeRecorder())
    if name == "pieces":
        monkeypatch.setattr(model_runner, "MAX_REREAD_BYTES", 0)
    return name


@pytest.fixture
def driver(folders: Path, how: str) -> Iterator[StepDriver]:
    config = EngineConfig(
        model=ModelConfig(str(folders / "base"), device="cpu", dtype="float32",
                          skip_tokenizer_init=True),
        memory=MemoryConfig(block_tokens=4, num_pages=200),
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64),
    )  # fmt: skip
    worker = Worker(config)
    if how != "eager":
        worker.parts.runner.capture_graphs(GraphConfig(), 64)
    yield StepDriver(worker, block_tokens=4, max_num_seqs=8)
    worker.close()


SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 7, "top_p": 0.9},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "num_logprobs": 2},
    {"min_tokens": 9, "stop_token_ids": int_array(range(0, 500, 3)), "temperature": 1.0},
    {"bad_word_ids": int_array([5, 6]), "bad_word_lengths": int_array([1, 1]), "top_k": 40},
]


@pytest.mark.parametrize(
    ("how", "sampling"),
    zip(["eager", "graph", "pieces", "graph", "eager"], SAMPLINGS, strict=True),
    indirect=["how"],
)
def test_tokens_after_drafts_are_those_of_single_steps(
    driver: StepDriver, folders: Path, how: str, sampling: dict[str, Any]
) -> None:
    """Right drafts bring the answer at once. After a wrong one, the next step mends all."""
    slot = driver.load("a", folders / "a")
    prompt = [5, 9, 200, 31, 5, 9, 77]
    plain = Sequence(prompt, slot, sampling)
    driver.run([plain], 12)
    other = Sequence(prompt, slot, sampling)
    driver.step([other], 64)
    right = plain.output
    result = verify(driver, other, right[1:5])
    assert list(result.token_ids) == right[1:6]
    assert result.kernels.startswith(how)
    assert [entry and entry.token_ids for entry in result.logprobs] == [
        entry and entry.token_ids for entry in plain.logprobs[1:6] if result.logprobs
    ]
    accept(other, result, 5)
    wrong = [right[6], (right[7] + 1) % 500, right[8], right[9]]
    result = verify(driver, other, wrong)
    assert list(result.token_ids[:2]) == right[6:8]
    accept(other, result, 2)
    result = verify(driver, other, right[8:11])
    assert list(result.token_ids) == right[8:12]


def verify(driver: StepDriver, sequence: Sequence, drafts: list[int]) -> StepResult:
    position, count = sequence.num_computed, 1 + len(drafts)
    pages = driver.take_pages(-(-(position + count) // 4) - len(sequence.pages))
    sequence.pages += pages
    return driver.send(
        StepPlan(
            step_id=driver.next_step_id,
            freed_slots=EMPTY,
            new_requests=[],
            page_slots=int_array([sequence.slot] * len(pages)),
            page_ids=int_array(pages),
            slots=int_array([sequence.slot]),
            positions=int_array([position]),
            num_tokens=int_array([count]),
            samples=int_array([count]),
            draft_ids=int_array(drafts),
        )
    )


def accept(sequence: Sequence, result: StepResult, num_new: int) -> None:
    sequence.output += result.token_ids[:num_new]
    sequence.num_computed += num_new
