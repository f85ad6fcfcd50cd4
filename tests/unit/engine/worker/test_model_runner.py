"""Steps of a worker against Hugging Face + PEFT, plan by plan."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from loraplex.engine.config import EngineConfig, ModelConfig
from loraplex.engine.worker import model_runner
from loraplex.engine.worker.worker import Worker
from loraplex.memory.config import MemoryConfig
from loraplex.scheduler.config import SchedulerConfig
from loraplex.scheduler.worker_protocol import StepResult, int_array

from helpers.models.hf_models import make_hf_model
from helpers.models.peft_adapters import make_adapter
from helpers.running.step_driver import Sequence, StepDriver

ADAPTERS: dict[str, dict[str, Any]] = {
    "a": {"r": 1, "alpha": 2, "targets": ["q_proj"]},
    "b": {"r": 8, "alpha": 16, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "c": {"r": 17, "alpha": 8, "targets": "all-linear", "use_rslora": True},
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Setup:
    """A model and adapters on disk, and the oracle's answers."""

    def __init__(self, root: Path) -> None:
        self.base = root / "base"
        self.model = make_hf_model("llama", self.base, seed=3)
        self.paths = {name: root / name for name in ADAPTERS}
        for seed, (name, options) in enumerate(ADAPTERS.items()):
            make_adapter(self.model, self.paths[name], seed=seed, **options)
        first, *rest = ADAPTERS
        self.peft = PeftModel.from_pretrained(self.model, self.paths[first], adapter_name=first)
        for name in rest:
            self.peft.load_adapter(self.paths[name], adapter_name=name)
        self._answers: dict[tuple[str, tuple[int, ...], int], list[int]] = {}

    def logits(self, name: str, tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            if not name:
                with self.peft.disable_adapter():
                    return self.peft(torch.tensor([tokens])).logits[0]
            self.peft.set_adapter(name)
            return self.peft(torch.tensor([tokens])).logits[0]

    def greedy(self, name: str, prompt: list[int], num_new: int) -> list[int]:
        """Returns the oracle's answer. Each is computed once a module."""
        key = (name, tuple(prompt), num_new)
        if key not in self._answers:
            tokens = list(prompt)
            for _ in range(num_new):
                tokens.append(int(self.logits(name, tokens)[-1].argmax()))
            self._answers[key] = tokens[len(prompt) :]
        return self._answers[key]

    def worker(self, device: str = "cpu", num_pages: int = 200, block_tokens: int = 8) -> Worker:
        return Worker(
            EngineConfig(
                model=ModelConfig(model=str(self.base), device=device, dtype="float32"),
                memory=MemoryConfig(
                    block_tokens=block_tokens, num_pages=num_pages, max_lora_rank=32,
                    max_adapter_slots=4,
                ),
                scheduler=SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=1024),
            )
        )  # fmt: skip


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(tmp_path_factory.mktemp("models"))


def make_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 512, (n,), generator=generator).tolist() for n in lengths]


def make_driver(setup: Setup, **options: Any) -> tuple[StepDriver, dict[str, int]]:
    driver = StepDriver(setup.worker(**options), block_tokens=8, max_num_seqs=16)
    slots = {name: driver.load(name, path) for name, path in setup.paths.items()}
    return driver, {"": -1, **slots}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("chunk", "preempt_every"), [(64, 0), (7, 0), (16, 3)])
def test_greedy_equals_peft(setup: Setup, chunk: int, preempt_every: int, device: str) -> None:
    driver, slots = make_driver(setup, device=device)
    cases = [
        (name, prompt)
        for name, prompt in zip(
            ["", "a", "b", "c", "", "c", "b", "a"],
            make_prompts(1, 2, 7, 8, 9, 33, 70, 16),
            strict=True,
        )
    ]
    sequences = [Sequence(prompt, slots[name]) for name, prompt in cases]
    driver.run(sequences, 8, chunk=chunk, preempt_every=preempt_every)
    for (name, prompt), sequence in zip(cases, sequences, strict=True):
        assert sequence.output == setup.greedy(name, prompt, 8), (name, len(prompt))


def test_adapters_change_the_answer(setup: Setup) -> None:
    prompt = make_prompts(12)[0]
    answers = {tuple(setup.greedy(name, prompt, 8)) for name in ["", *ADAPTERS]}
    assert len(answers) == 4


def test_sampling_survives_preemption_and_chunks(setup: Setup) -> None:
    """Same seed, same answer, whatever shared the batch; penalties see what was sampled."""
    sampling = {
        "temperature": 1.1, "top_p": 0.95, "seed": 12345, "repetition_penalty": 1.2,
        "presence_penalty": 0.5, "frequency_penalty": 0.5,
    }  # fmt: skip
    prompt, *others = make_prompts(20, 5, 40)
    answers = []
    for chunk, preempt_every, company in ((64, 0, 0), (6, 0, 2), (64, 2, 0), (3, 4, 1)):
        driver, slots = make_driver(setup)
        sequences = [Sequence(p, slots["c"]) for p in others[:company]]
        sequences.append(Sequence(prompt, slots["b"], sampling))
        driver.run(sequences, 12, chunk=chunk, preempt_every=preempt_every)
        answers.append(sequences[-1].output)
    assert answers == [answers[0]] * 4
    assert len(set(answers[0])) > 3


@pytest.mark.parametrize("device", DEVICES)
def test_logprobs(setup: Setup, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_runner, "PROMPT_SCORE_ROWS", 4)
    driver, slots = make_driver(setup, device=device)
    prompts = make_prompts(19, 6, 11)
    sequences = [
        Sequence(prompts[0], slots["b"], {"num_logprobs": 3, "num_prompt_logprobs": 2}),
        Sequence(prompts[1], -1, {}),
        Sequence(prompts[2], -1, {"num_logprobs": 0, "temperature": 0.9, "bias_token_ids":
                 int_array([4])} | {"bias_values": torch.tensor([50.0]).numpy()}),
    ]  # fmt: skip
    driver.run(sequences, 5, chunk=8)
    assert sequences[1].logprobs == [None] * 5 and not sequences[1].prompt_logprobs
    for sequence, name, num_best in ((sequences[0], "b", 3), (sequences[2], "", 0)):
        tokens = sequence.prompt + sequence.output
        want = setup.logits(name, tokens).log_softmax(-1)
        for index, entry in enumerate(sequence.logprobs):
            _check_entry(entry, want[len(sequence.prompt) + index - 1], sequence.output[index])
            assert len(entry.token_ids) == 1 + num_best
    assert sequences[2].output == [4] * 5 and sequences[2].logprobs[0].logprobs[0] < -1
    pieces = sequences[0].prompt_logprobs
    positions = [p.first_position + i for p in pieces for i in range(len(p.entries))]
    assert positions == list(range(1, 19))
    want = setup.logits("b", prompts[0]).log_softmax(-1)
    for position, entry in zip(positions, (e for p in pieces for e in p.entries), strict=True):
        _check_entry(entry, want[position - 1], prompts[0][position])
        assert len(entry.token_ids) == 3


def _check_entry(entry: Any, want: torch.Tensor, token: int) -> None:
    assert entry.token_ids[0] == token
    assert entry.ranks[0] == int((want > want[token]).sum()) + 1
    assert list(entry.ranks[1:]) == list(range(1, len(entry.token_ids)))
    best = want.topk(len(entry.token_ids) - 1).indices.tolist()
    assert list(entry.token_ids[1:]) == best
    for token_id, logprob in zip(entry.token_ids, entry.logprobs, strict=True):
        assert math.isclose(logprob, float(want[token_id]), abs_tol=1e-3)


@pytest.mark.gpu
def test_warm_up_leaves_no_trace(setup: Setup) -> None:
    worker = setup.worker("cuda")
    parts = worker.parts
    parts.runner.warm_up(1024, 8)
    table = parts.table.table
    assert not table.host_rank.any() and not table.rank.any()
    assert not parts.pool.pages[:, 1:].any()
    worker.close()


def test_plan_without_rows(setup: Setup) -> None:
    driver, _ = make_driver(setup)
    result = driver.step([], 1)
    assert result == StepResult(step_id=0, token_ids=int_array(), step_us=result.step_us)


def test_stale_state_of_a_slot_is_gone(setup: Setup) -> None:
    """Each request takes the slot, the pages and so the rows that the last one left."""
    driver, slots = make_driver(setup, num_pages=150)
    prompts = make_prompts(60, 3, 25, 1)
    spicy = {"temperature": 1.5, "top_k": 3, "min_tokens": 9, "stop_token_ids": int_array([5]),
             "num_logprobs": 2, "repetition_penalty": 2.0}  # fmt: skip
    for index, prompt in enumerate(prompts):
        noisy = [Sequence(prompts[0], slots["c"], spicy)]
        driver.run(noisy, 4)
        name = ["", "a", "b", "c"][index]
        clean = Sequence(prompt, slots[name])
        driver.run([clean], 6)
        assert clean.output == setup.greedy(name, prompt, 6)
        assert clean.logprobs == [None] * 6
