"""Runs one batch through engines that differ in ranks, graphs and overlap, and compares them.

Each engine starts once. On a GPU its start takes longer than all its answers.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch

from helpers.models.bf16_oracles import (
    NUM_NEW_TOKENS,
    Noise,
    Oracles,
    answer,
    judge,
    start,
    stats_of,
)
from helpers.models.peft_oracle import tight_num_pages

PLAIN: dict[str, Any] = {"enforce_eager": True, "max_steps_in_flight": 1}
FAST: dict[str, Any] = {"max_num_batched_tokens": 512, "graph_seconds": 10.0}
"""Graphs, overlap, and prompts in chunks; see also RankRuns.fast."""


@dataclass(frozen=True)
class Run:
    """The answers of an engine.

    Attributes:
        outputs: a RequestOutput for each case.
        warm: the same cases asked again, without the prompts' log-probabilities: these would keep
            prompts from the prefix cache.
        stats: after the answers, with `adapter_pages`.
    """

    outputs: list[Any]
    warm: list[Any]
    stats: dict[str, Any]


class RankRuns:
    """Runs of several engines over the same cases, made when they are first asked for."""

    def __init__(self, oracles: Oracles, **options: Any) -> None:
        """`options` are of all engines."""
        self.oracles = oracles
        self.cases = oracles.cases()
        self._options = options
        self._runs: dict[str, Run] = {}
        self._noise: dict[str, Noise] = {}

    def plain(self, **options: Any) -> Run:
        """Returns the run of an engine without graphs or overlap, in which every prompt fits."""
        return self._run("plain", PLAIN | options)

    def fast(self, **options: Any) -> Run:
        """Returns the run of an engine with all that makes steps fast, which has to preempt.

        Its second batch counts: in the first one each adapter's requests may end before the next
        adapter is there.
        """
        num_pages = tight_num_pages(
            self.cases, self.plain(**options).stats["adapter_pages"], num_new_tokens=NUM_NEW_TOKENS
        )
        return self._run("fast", FAST | {"num_pages": num_pages} | options, repeat=2)

    def other(self, name: str, **options: Any) -> Run:
        return self._run(name, FAST | options)

    def judge(self, name: str, run: Run) -> Noise:
        """Prints the errors against fp32. Raises AssertionError unless they are noise of bf16."""
        if name not in self._noise:
            print(f"\n{name}: ", end="")
            self._noise[name] = judge(self.oracles, self.cases, run.outputs)
        return self._noise[name]

    def compare(self, title: str, one: list[Any], other: list[Any], noise: Noise) -> None:
        """Prints how far two runs are apart, up to the first token in which two answers differ.

        Raises AssertionError if that is more than `judge` allows both to be from fp32 together.
        """
        differences, num_parted = [], 0
        for a, b in zip(one, other, strict=True):
            ids, others = a.outputs[0].token_ids, b.outputs[0].token_ids
            pairs = zip(ids, others, a.outputs[0].logprobs, b.outputs[0].logprobs, strict=True)
            for token, its, entries, other_entries in pairs:
                if token != its:
                    num_parted += 1
                    break
                differences.append(entries[token].logprob - other_entries[token].logprob)
        values = torch.tensor(differences)
        rms, largest = values.square().mean().sqrt().item(), values.abs().max().item()
        print(
            f"\n{title}: {len(differences)} tokens, difference {rms:.4f} (at most {largest:.3f}), "
            f"{num_parted} of {len(one)} answers part"
        )
        assert rms <= 2 * (1.25 * noise.of_oracle + 1e-3)
        assert len(differences) > len(one) * NUM_NEW_TOKENS // 4, "most answers part early"

    def _run(self, name: str, options: dict[str, Any], *, repeat: int = 1) -> Run:
        if name not in self._runs:
            begin = time.monotonic()
            with start(self.oracles, **{**self._options, **options}) as llm:
                ready = time.monotonic()
                for _ in range(repeat):
                    outputs = answer(llm, self.cases)
                warm = answer(llm, self.cases, prompt_logprobs=None)
                self._runs[name] = Run(outputs, warm, stats_of(llm))
            now = time.monotonic()
            print(f"\n{name}: started in {ready - begin:.0f} s, answered in {now - ready:.0f} s")
        return self._runs[name]
