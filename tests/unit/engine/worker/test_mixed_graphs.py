"""Steps in pieces against the same steps run eagerly, and against Hugging Face + PEFT."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from loraplex.engine.config import EngineConfig, ModelConfig
from loraplex.engine.worker.graphs import mixed
from loraplex.engine.worker.graphs.capture import BASE
from loraplex.memory.config import MemoryConfig
from loraplex.scheduler.config import SchedulerConfig

from helpers.fakes.fake_graphs import FakeRecorder, allow_graphs
from helpers.models.hf_models import make_hf_model
from helpers.models.peft_adapters import make_adapter
from helpers.running.step_driver import Sequence
from helpers.running.step_runner import STEPS, StepRunner, make_sequences

ADAPTERS: dict[str, dict[str, Any]] = {
    "a": {"r": 3, "alpha": 6, "targets": ["q_proj", "o_proj", "down_proj"]},
    "b": {"r": 17, "alpha": 8, "targets": "all-linear"},
}
MAX_TOKENS, NUM_LAYERS = 96, 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model and its adapters."""
    root = tmp_path_factory.mktemp("models")
    model = make_hf_model("llama", root / "base", seed=4, num_hidden_layers=NUM_LAYERS)
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        make_adapter(model, root / name, seed=seed, **options)
    return root


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Several threads share out a product by where its operands lie, and then round otherwise."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def make_runner(root: Path, capture: bool = True) -> StepRunner:
    config = EngineConfig(
        model=ModelConfig(model=str(root / "base"), device="cpu", dtype="float32"),
        memory=MemoryConfig(block_tokens=8, num_pages=150, max_lora_rank=32, max_adapter_slots=4),
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=MAX_TOKENS),
    )
    return StepRunner(config, root, capture)


@pytest.mark.parametrize("padded", [False, True])
def test_pieces_equal_the_eager_forward(
    root: Path, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit where every number of tokens is captured: nothing but the code runs then. In
    the real ladder, products of padded rows may round otherwise."""
    if not padded:
        every = list(range(MAX_TOKENS, 0, -1))
        monkeypatch.setattr(mixed, "mixed_ladder", lambda max_tokens: every)
    eager, recorder = make_runner(root, capture=False), FakeRecorder()
    allow_graphs(monkeypatch, recorder)
    pieces = make_runner(root)
    runs = [(eager, make_sequences(eager.slots)), (pieces, make_sequences(pieces.slots))]
    for names, chunk in STEPS:
        pieces.poison()
        for runner, sequences in runs:
            runner.step([sequences[name] for name in names], chunk)
        if pieces.hidden[-1] is not None:
            _check_hidden(eager.hidden[-1], pieces.hidden[-1], padded)
        _check_pages(eager.pool, pieces.pool, padded)
    assert all(kernels.startswith("eager") for kernels in eager.kernels)
    assert {"pieces", "pieces+bmm", "graph+bmm", "eager+bmm"} == set(pieces.kernels)
    assert {kind for _, kind, _ in pieces.used} == {BASE, "one", "several"}
    assert any(num_tokens < size for size, _, num_tokens in pieces.used) == padded
    for want, got in zip(*(sequences.values() for _, sequences in runs), strict=True):
        assert got.output == want.output
        _check_scores(want, got)
    assert recorder.num_spoiled > 100


def _check_hidden(want: torch.Tensor, got: torch.Tensor, padded: bool) -> None:
    assert got.shape == want.shape and got.isfinite().all()
    if padded:
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    else:
        assert torch.equal(got, want)


def _check_pages(want: torch.Tensor, got: torch.Tensor, padded: bool) -> None:
    """Padded rows may write row 0 of the null page, and nothing else, and no NaN."""
    if padded:
        torch.testing.assert_close(got[:, 1:], want[:, 1:], atol=2e-5, rtol=0)
    else:
        assert torch.equal(got[:, 1:], want[:, 1:])
    null_page = got[:, 0].unflatten(1, (2, 8, -1))  # K | V, rows
    assert null_page.isfinite().all() and not null_page[:, :, 1:].any()


def _check_scores(want: Sequence, got: Sequence) -> None:
    assert len(got.prompt_logprobs) == len(want.prompt_logprobs)
    for ours, theirs in zip(got.prompt_logprobs, want.prompt_logprobs, strict=True):
        assert ours.first_position == theirs.first_position
        for entry, other in zip(ours.entries, theirs.entries, strict=True):
            assert entry.token_ids == other.token_ids
            assert entry.logprobs[0] == pytest.approx(other.logprobs[0], abs=1e-4)


def test_answers_in_pieces_and_decode_graphs_equal_peft(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow_graphs(monkeypatch, FakeRecorder())
    runner = make_runner(root)
    sequences = [Sequence(s.prompt, s.adapter_slot) for s in make_sequences(runner.slots).values()]
    runner.driver.run(sequences, 5, chunk=15, preempt_every=3)
    assert runner.used
    model = make_hf_model("llama", root / "again", seed=4, num_hidden_layers=NUM_LAYERS)
    peft = PeftModel.from_pretrained(model, root / "a", adapter_name="a")
    peft.load_adapter(root / "b", adapter_name="b")
    names = {slot: name for name, slot in runner.slots.items()}
    for sequence in sequences:
        tokens = list(sequence.prompt)
        for _ in range(5):
            tokens.append(int(_logits(peft, names[sequence.adapter_slot], tokens).argmax()))
        assert sequence.output == tokens[len(sequence.prompt) :]


@torch.no_grad()
def _logits(peft: PeftModel, name: str, tokens: list[int]) -> torch.Tensor:
    if name:
        peft.set_adapter(name)
        return peft(torch.tensor([tokens])).logits[0, -1]
    with peft.disable_adapter():
        return peft(torch.tensor([tokens])).logits[0, -1]


def test_what_is_captured_and_said(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode graphs first; then pieces, of each size all kinds or none."""
    recorder = FakeRecorder()
    allow_graphs(monkeypatch, recorder)
    runner, each = make_runner(root), NUM_LAYERS + 1
    num_decode, num_mixed = 4 * 5, 5 * 5  # 1 2 4 8 rows; 8 16 32 64 96 tokens
    assert runner.said == (
        f"captured {num_decode} CUDA graphs of decode steps of 1 to 8 rows and "
        f"{num_mixed * each} pieces of mixed steps of 8 to 96 tokens for nothing"
    )
    num_rare = 2  # 8 rows, each with all groups
    assert recorder.num_recorded == num_decode + num_mixed * each + num_rare
    assert recorder.num_warmed_up == num_decode + num_mixed * 3 + num_rare
    fit = runner.mixed.fit
    assert [fit(n, "one") for n in (1, 8, 9, 33, 65, 96, 97)] == [8, 8, 16, 64, 96, 96, 0]


@pytest.mark.parametrize(
    ("capacity", "said", "kernels"),
    [
        (0, "0 CUDA graphs of decode steps and 0 pieces of mixed steps for", "eager+bmm"),
        (20, "20 CUDA graphs of decode steps of 1 to 8 rows and 0 pieces of mixed", "eager+bmm"),
        (21, "25 pieces of mixed steps of 96 to 96 tokens for", "pieces+bmm"),
    ],
)
def test_a_full_recorder_leaves_steps_eager(
    root: Path, capacity: int, said: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow_graphs(monkeypatch, FakeRecorder(capacity))
    runner = make_runner(root)
    assert said in runner.said
    runner.step([make_sequences(runner.slots)["y"]], 40)
    assert runner.kernels == [kernels]


def test_buffers_keep_their_addresses(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allow_graphs(monkeypatch, FakeRecorder())
    runner = make_runner(root)
    before = [tensor.data_ptr() for tensor in runner.static_buffers]
    sequences = make_sequences(runner.slots)
    for names, chunk in STEPS[:6]:
        runner.step([sequences[name] for name in names], chunk)
    assert [tensor.data_ptr() for tensor in runner.static_buffers] == before
    assert len(runner.used) > 3
