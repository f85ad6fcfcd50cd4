"""Judges answers by Hugging Face + PEFT, and defines the adapters that parity tests share."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from helpers.models.peft_adapters import make_adapter


@dataclass(frozen=True)
class AdapterSpec:
    ranks: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)


ADAPTERS = {
    "r1-q": AdapterSpec((1,), {"r": 1, "alpha": 4, "targets": ["q_proj"]}),
    "r4-regex": AdapterSpec((4,), {"r": 4, "alpha": 8, "targets": r".*\.mlp\.(gate|up|down)_proj"}),
    "r8-qkvo": AdapterSpec(
        (8,), {"r": 8, "alpha": 16, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    ),
    "r16-all-rslora": AdapterSpec(
        (16,), {"r": 16, "alpha": 8, "targets": "all-linear", "use_rslora": True}
    ),
    "r17-pattern": AdapterSpec(
        (17, 3, 5),
        {
            "r": 17,
            "alpha": 20,
            "targets": ["q_proj", "v_proj", "up_proj", "down_proj"],
            "rank_pattern": {"q_proj": 3, r"layers.1.mlp.up_proj": 5},
            "alpha_pattern": {"v_proj": 40, r"layers.0.self_attn.q_proj": 9},
        },
    ),
    "r64-kd": AdapterSpec((64,), {"r": 64, "alpha": 32, "targets": ["k_proj", "down_proj"]}),
}


@dataclass(frozen=True)
class Case:
    adapter: str  # empty: the base model
    prompt: tuple[int, ...]


def adapter_names() -> list[str]:
    return list(ADAPTERS)


def make_adapters(model: Any, root: Path, *, strength: float = 2.0) -> None:
    """Save every adapter of ADAPTERS below `root`.

    `strength` is the size of each update relative to the weight that it is added to.
    """
    for seed, (name, spec) in enumerate(ADAPTERS.items()):
        make_adapter(model, root / name, seed=seed, strength=strength, **spec.options)


class PeftOracle:
    """Judges one answer at a time, with no batching, no cache and no code of ours.

    `model` is the base model where the caller has one already; otherwise `base` names its folder,
    and `num_tokens` the number of tokens to which it is resized.
    """

    def __init__(
        self,
        base: Path,
        adapters: Path,
        *,
        model: Any = None,
        names: list[str] | None = None,
        num_tokens: int | None = None,
        device: str = "cpu",
    ) -> None:
        self.base, self.adapters = base, adapters
        self._num_tokens = num_tokens
        self.names = adapter_names() if names is None else names
        self._device = device
        self._given_model = model
        self._choices: dict[tuple[Case, tuple[int, ...]], list[int]] = {}

    @cached_property
    def model(self) -> PeftModel:
        base = self._given_model
        if base is None:
            base = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
            if self._num_tokens is not None:
                base.resize_token_embeddings(self._num_tokens, mean_resizing=False)
        base = base.to(self._device)
        first, *rest = self.names
        model = PeftModel.from_pretrained(base, self.adapters / first, adapter_name=first)
        for name in rest:
            model.load_adapter(self.adapters / name, adapter_name=name)
        return model.eval()

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    def logits(self, case: Case, tokens: list[int]) -> torch.Tensor:
        """Returns the logits of the case's adapter: float32 [len(tokens), vocabulary]."""
        ids = torch.tensor([tokens], device=self._device)
        with torch.inference_mode(), self.adapted(case.adapter) as model:
            return model(ids).logits[0].float()

    @contextmanager
    def adapted(self, adapter: str) -> Iterator[PeftModel]:
        """Gives the model with one adapter active; "" is the base model."""
        if adapter:
            self.model.set_adapter(adapter)
            yield self.model
        else:
            with self.model.disable_adapter():
                yield self.model

    def choices(self, case: Case, answer: list[int]) -> list[int]:
        """Returns the best token at each place of `answer`, given the tokens before that place.

        By induction this equals `answer` if and only if `answer` is the greedy continuation of the
        prompt. One forward pass judges the whole answer.
        """
        key = (case, tuple(answer))
        if key not in self._choices:
            logits = self.logits(case, [*case.prompt, *answer[:-1]])
            self._choices[key] = logits[len(case.prompt) - 1 :].argmax(dim=-1).tolist()
        return self._choices[key]


def tight_num_pages(
    cases: list[Case], adapter_pages: int, *, num_new_tokens: int, block_tokens: int = 16
) -> int:
    """Returns a number of pages that lets every case start, but not every case finish.

    Each case has a page to spare at its start.
    """

    def num_kv_pages(num_tokens: int) -> int:
        return sum(-(-(len(case.prompt) + num_tokens) // block_tokens) for case in cases)

    at_start = num_kv_pages(1) + len(cases)
    growth = num_kv_pages(num_new_tokens) - at_start
    assert growth >= 3, "the cases do not grow enough to run out of pages"
    return 1 + adapter_pages + at_start + growth // 3


def make_cases(
    oracle: PeftOracle, lengths: tuple[int, ...], adapters: tuple[str, ...] = ("", *ADAPTERS)
) -> list[Case]:
    """Returns a case for each adapter and length, interleaved; "" is the base model.

    Adapters share the prompt of a length.
    """
    generator = torch.Generator().manual_seed(11)
    cases = []
    for length in lengths:
        prompt = torch.randint(0, oracle.vocab_size, (length,), generator=generator)
        cases += [Case(name, tuple(prompt.tolist())) for name in adapters]
    return cases
