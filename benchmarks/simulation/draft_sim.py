"""Simulates drafts from a request's own text: how many steps do they save, by rate of edits?

The scheduler and its drafter are real. The texts are the documentation of Python's library, by
words: a prompt, and an answer that repeats it but for edits (words exchanged, added or left out,
one to three at a time). The seconds are modelled: Llama-3-8B in bf16 on one H200. No GPU is used.

    python benchmarks/simulation/draft_sim.py --out draft_sim.jsonl

takes about two minutes.
"""

import argparse
import heapq
import inspect
import random
import re
import statistics
import subprocess
import tempfile
import threading
from array import array
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from loraplex.entrypoints.bench.results import Results, Table
from loraplex.memory.config import MemoryConfig
from loraplex.scheduler.config import SchedulerConfig
from loraplex.scheduler.request import Request
from loraplex.scheduler.scheduler import Scheduler
from loraplex.scheduler.worker_protocol import StepPlan, StepResult, int_array

from modelled_engine import NO_SAMPLING

NOTE = "simulation: the real scheduler and drafter, modelled steps (Llama-3-8B on one H200)"
MODULES = (argparse, inspect, random, re, statistics, subprocess, tempfile, threading)
PROMPT_LEN = ANSWER_LEN = 256
STEP_S, TOKEN_S = 4.7e-3, 2e-6  # measured: 4.7 ms at 8 rows, 5.0 ms with 15 drafts for each
ROUND_TRIP_S = 2e-3  # measured: a result to the scheduler, and the plan that waits for it back
EDIT_SIZES = (1, 1, 2, 3)


def library_words() -> list[int]:
    """Returns the words of the documentation, numbered by first use."""
    members = [member for module in MODULES for _, member in sorted(vars(module).items())]
    text = " ".join(inspect.getdoc(member) or "" for member in members)
    words = re.findall(r"\w+|[^\w\s]", text)
    numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
    return [numbers[word] for word in words]


def edited(rng: random.Random, prompt: list[int], words: list[int], rate: float) -> list[int]:
    """Returns the prompt with an edit before a share `rate` of its words."""
    answer: list[int] = []
    place = 0
    while len(answer) < ANSWER_LEN:
        if rng.random() < rate:
            kind, size = rng.choice(("exchange", "add", "leave out")), rng.choice(EDIT_SIZES)
            answer += [] if kind == "leave out" else rng.choices(words, k=size)
            place += 0 if kind == "add" else size
        else:
            answer.append(prompt[place % PROMPT_LEN])
            place += 1
    return answer[:ANSWER_LEN]


class DraftSimulation:
    """Serves requests, at most `batch` at a time, with one GPU that takes steps in turn."""

    def __init__(self, texts: list[list[int]], batch: int, speculation: str) -> None:
        """`texts` are prompts with their answers, PROMPT_LEN + ANSWER_LEN tokens each."""
        self._now = 0.0
        self._texts = texts
        self._text_of: dict[int, list[int]] = {}  # slot -> text
        self._scheduler = Scheduler(
            config=SchedulerConfig(max_num_seqs=batch, speculative_config=speculation),
            memory=MemoryConfig(enable_prefix_caching=False),
            num_pages=64 * batch,
            max_model_len=PROMPT_LEN + ANSWER_LEN,
            base_fingerprint="modelled",
            clock=lambda: self._now,
        )

    def run(self) -> dict[str, Any]:
        for number, text in enumerate(self._texts):
            self._scheduler.add(
                Request(
                    request_id=number,
                    prompt_token_ids=array("i", text[:PROMPT_LEN]),
                    sampling=replace(NO_SAMPLING, max_tokens=ANSWER_LEN),
                    adapter="",
                    salt=str(number),
                )
            )
        results: list[tuple[float, int, StepResult]] = []
        free_at = 0.0
        num_steps = 0
        while True:
            while plan := self._scheduler.plan():
                start = max(self._now + ROUND_TRIP_S / 2, free_at)
                free_at = start + STEP_S + sum(plan.num_tokens) * TOKEN_S
                num_steps += 1
                result = StepResult(plan.step_id, int_array(self._sample(plan)))
                heapq.heappush(results, (free_at + ROUND_TRIP_S / 2, num_steps, result))
            if not results:
                break
            self._now, _, result = heapq.heappop(results)
            self._scheduler.commit(result)
        stats = self._scheduler.stats()
        return {
            "tokens_s": round(len(self._texts) * ANSWER_LEN / self._now, 1),
            "steps": num_steps,
            "drafted": stats["num_drafted_tokens"],
            "accepted": stats["num_accepted_tokens"],
        }

    def _sample(self, plan: StepPlan) -> list[int]:
        """Returns the next words of each row's text. One after a wrong draft is not looked at."""
        for new in plan.new_requests:
            prompt = list(new.token_ids[:PROMPT_LEN])
            self._text_of[new.slot] = next(t for t in self._texts if t[:PROMPT_LEN] == prompt)
        ids: list[int] = []
        rows = zip(plan.slots, plan.positions, plan.num_tokens, plan.samples, strict=True)
        for slot, position, num_tokens, samples in rows:
            end = position + num_tokens + 1
            words = self._text_of[slot][end - samples : end]
            ids += words + [0] * (samples - len(words))
        return ids


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rates", nargs="+", type=float, default=[0.0, 0.02, 0.05, 0.1, 0.2])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--speculative-config", default="ngram")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = Results(args.out, None, lambda rows: [])
    words = library_words()
    table = Table(edits=5, batch=5, plain_tokens_s=14, tokens_s=9, speedup=7, steps=6,
                  drafted=8, accepted=8)  # fmt: skip
    for batch in args.batches:
        for rate in args.rates:
            rng = random.Random(batch)
            texts = []
            for _ in range(max(16, 3 * batch)):
                first = rng.randrange(len(words) - PROMPT_LEN)
                prompt = words[first : first + PROMPT_LEN]
                texts.append(prompt + edited(rng, prompt, words, rate))
            plain = DraftSimulation(texts, batch, "").run()
            row = DraftSimulation(texts, batch, args.speculative_config).run()
            row |= {
                "edits": rate, "batch": batch, "plain_tokens_s": plain["tokens_s"],
                "speedup": round(row["tokens_s"] / plain["tokens_s"], 2),
            }  # fmt: skip
            table.add(row)
            results.write({"note": NOTE, "speculative_config": args.speculative_config, **row})


if __name__ == "__main__":
    main()
