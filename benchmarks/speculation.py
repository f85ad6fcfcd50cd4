"""Measures what drafts from a request's own text bring, and what they cost where they are none.

Two engines, without speculation and with it, take turns on the same requests:

- copy: a text and its first words again, which the real SmolLM2 continues as the text goes on.
- cycle: answers of four tokens only, which soon repeat themselves. For models of random weights.
- random: prompts of random tokens, drawn at temperature 1: nothing repeats itself.

    python benchmarks/speculation.py --tasks copy random --out speculation.jsonl
    python benchmarks/speculation.py --model llama-3-8b --tasks cycle random --out speculation.jsonl

Prompts are in the prefix cache when they are timed, so nearly all of the time is decoding. Greedy
answers of the two engines are compared; in 16 bits, rounding may part them.
"""

import argparse
import inspect
import json
import logging
import random
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from loraplex import LLM, SamplingParams
from loraplex.engine.config import EngineConfig, GraphConfig, ModelConfig
from loraplex.entrypoints.bench import dummy
from loraplex.entrypoints.bench.results import Results, Table
from loraplex.memory.config import MemoryConfig
from loraplex.scheduler.config import SchedulerConfig

TASKS = ("copy", "cycle", "random")
COUNTS = ("num_steps", "num_drafted_tokens", "num_accepted_tokens", "step_us")
CYCLE_BIAS = dict.fromkeys((40, 41, 42, 43), 100.0)
MODULES = (argparse, json, logging, random, statistics, inspect, tempfile, time)


def free_text(number: int, num_words: int) -> str:
    """Returns words of the documentation of Python's library, different for each number."""
    module = MODULES[number % len(MODULES)]
    docs = [inspect.getdoc(member) or "" for _, member in sorted(vars(module).items(), key=str)]
    words = " ".join([inspect.getdoc(module) or "", *docs]).split()
    first = 37 * (number // len(MODULES))
    return " ".join((words[first:] + words)[:num_words])


def make_prompts(llm: LLM, task: str, batch: int, args: argparse.Namespace) -> list[Any]:
    rng = random.Random(batch)
    if task != "copy":
        size = llm.info.vocab_size
        return [
            {"prompt_token_ids": [rng.randrange(size) for _ in range(args.prompt_len)]}
            for _ in range(batch)
        ]
    prompts = []
    for number in range(batch):
        words = free_text(number, args.prompt_len).split()
        prompts.append(f"{' '.join(words)}\n\nThe same text again:\n\n{' '.join(words[:12])}")
    return prompts


def answer(llm: LLM, task: str, prompts: list[Any], args: argparse.Namespace) -> list[list[int]]:
    sampling: dict[str, Any] = {"copy": {}, "cycle": {"logit_bias": CYCLE_BIAS}}.get(task, {})
    params = SamplingParams(
        temperature=1.0 if task == "random" else 0.0, seed=1, max_tokens=args.answer_len,
        ignore_eos=True, **sampling,
    )  # fmt: skip
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def measure(
    engines: dict[str, LLM], task: str, batch: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Returns medians over the rounds; the two engines take turns in each."""
    prompts = {name: make_prompts(llm, task, batch, args) for name, llm in engines.items()}
    answers = {name: answer(llm, task, prompts[name], args) for name, llm in engines.items()}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    before = {name: llm.client.stats() for name, llm in engines.items()}
    for _ in range(args.rounds):
        for name, llm in engines.items():
            start = time.perf_counter()
            answer(llm, task, prompts[name], args)
            seconds[name].append(time.perf_counter() - start)
    after = {name: llm.client.stats() for name, llm in engines.items()}
    row: dict[str, Any] = {"task": task, "batch": batch}
    num_tokens = batch * args.answer_len
    for name in engines:
        median = statistics.median(seconds[name])
        count = {key: after[name][key] - before[name][key] for key in COUNTS}
        row[f"{name}_tokens_s"] = round(num_tokens / median, 1)
        row[f"{name}_steps"] = count["num_steps"] // args.rounds
        row[f"{name}_step_ms"] = round(count["step_us"] / max(1, count["num_steps"]) / 1e3, 3)
    row["speedup"] = round(row["ngram_tokens_s"] / row["plain_tokens_s"], 3)
    row["drafted"] = count["num_drafted_tokens"] // args.rounds
    row["accepted"] = count["num_accepted_tokens"] // args.rounds
    pairs = zip(answers["plain"], answers["ngram"], strict=True)
    row["equal_answers"] = sum(one == other for one, other in pairs) / batch
    kernels = after["ngram"]["steps_by_kernels"]
    known = before["ngram"]["steps_by_kernels"]
    row["ngram_kernels"] = {k: n - known.get(k, 0) for k, n in kernels.items()}
    return row


def start(args: argparse.Namespace, folder: str, speculation: str) -> LLM:
    model, load_format = args.model, "auto"
    if model in dummy.MODELS:
        path = Path(folder) / "model"
        model = str(path if path.exists() else dummy.write_model(path, model))
        load_format = "dummy"
    return LLM.from_config(
        EngineConfig(
            model=ModelConfig(
                model=model, load_format=load_format, device=args.device, dtype=args.dtype,
                skip_tokenizer_init=load_format == "dummy",
            ),
            memory=MemoryConfig(num_pages=args.num_pages),
            scheduler=SchedulerConfig(
                max_num_seqs=args.max_num_seqs, speculative_config=speculation
            ),
            graph=GraphConfig(graph_bytes=1 << 30),
        )
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="", help="as of loraplex serve, or a known shape")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["copy", "random"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--speculative-config", default="ngram")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--num-pages", type=int, default=2048, help="of each of the two engines")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--prompt-len", type=int, default=256, help="tokens, or words of a text")
    parser.add_argument("--answer-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = Results(args.out, None, lambda rows: [])
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as folder, ExitStack() as stack:
        engines = {
            name: stack.enter_context(start(args, folder, speculation))
            for name, speculation in (("plain", ""), ("ngram", args.speculative_config))
        }
        worker = engines["plain"].info.workers[0]
        setup = {
            "benchmark": "benchmarks/speculation.py", "model": args.model or "SmolLM2-135M",
            "device": worker.device, "dtype": args.dtype,
            "attention_backend": worker.attention_backend,
            "speculative_config": args.speculative_config, "prompt_len": args.prompt_len,
            "answer_len": args.answer_len, "rounds": args.rounds,
        }  # fmt: skip
        table = Table(task=-7, batch=5, plain_tokens_s=14, ngram_tokens_s=14, speedup=7,
                      plain_steps=11, ngram_steps=11, plain_step_ms=13, ngram_step_ms=13,
                      drafted=7, accepted=8, equal_answers=13)  # fmt: skip
        for task in args.tasks:
            for batch in args.batches:
                row = measure(engines, task, batch, args)
                table.add(row)
                results.write(setup | row)


if __name__ == "__main__":
    main()
