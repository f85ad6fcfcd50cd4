"""Measures the masks of constrained requests in the scheduler's process, without an engine.

Each step gives every request a random token that its grammar allows, and waits for all next masks.
Times are CPU times, which other work on the machine hardly changes.

    python benchmarks/grammar_masks.py --label after --out grammar_masks_cpu.jsonl
"""

import argparse
import json
import os
import tempfile
import time
from array import array
from pathlib import Path

import numpy as np
from structured_output import schema, write_tokenizer

from loraplex import StructuredOutputsParams
from loraplex.engine.grammar.request_queue import GrammarQueue
from loraplex.engine.grammar.vocabulary import Vocabulary
from loraplex.engine.grammar.vocabulary_cache import VocabularyCache
from loraplex.engine.tokenizer.loading import load_tokenizer
from loraplex.scheduler.request import Request
from loraplex.scheduler.worker_protocol import SamplingSpec, int_array

WARM_UP_STEPS = 20
NUM_SCHEMAS = 8


def make_request(number: int, stop_id: int) -> Request:
    form = StructuredOutputsParams(json=schema(number % NUM_SCHEMAS), disable_any_whitespace=True)
    sampling = SamplingSpec(
        temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, seed=0, repetition_penalty=1.0,
        presence_penalty=0.0, frequency_penalty=0.0, max_tokens=10_000, min_tokens=0,
        stop_token_ids=int_array([stop_id]), num_logprobs=-1, num_prompt_logprobs=-1,
        bias_token_ids=int_array(), bias_values=array("f"),
    )  # fmt: skip
    return Request(
        request_id=number, prompt_token_ids=array("i", [5]), sampling=sampling,
        grammar=form.to_grammar(),
    )  # fmt: skip


def measure(vocabulary: Vocabulary, num_rows: int, num_steps: int, stop_id: int) -> dict:
    """Returns milliseconds of CPU time a step, of all rows."""
    num_wakeups = 0

    def wakeup() -> None:
        nonlocal num_wakeups
        num_wakeups += 1

    queue = GrammarQueue(VocabularyCache(lambda own: vocabulary), wakeup)
    requests = [make_request(number, stop_id) for number in range(num_rows)]
    for request in requests:
        queue.add(request)
    num_left = num_rows
    while num_left:
        for _, error in queue.take_compiled():
            if error:
                raise SystemExit(error)
            num_left -= 1
        time.sleep(0.01)
    rng = np.random.default_rng(0)
    own, whole = [], []
    for step in range(WARM_UP_STEPS + num_steps):
        tokens = [random_token(request, stop_id, rng) for request in requests]
        if step == WARM_UP_STEPS:
            num_wakeups, own, whole = 0, [], []
        begin, begin_own = time.process_time(), time.thread_time()
        for request, token_id in zip(requests, tokens, strict=True):
            request.constraint.advance(token_id)  # type: ignore[union-attr]
        own.append(time.thread_time() - begin_own)
        queue.wait_for_masks(60.0)
        whole.append(time.process_time() - begin)
    queue.close()
    return {
        "scheduler_thread_ms": round(1e3 * float(np.median(own)), 3),
        "process_ms": round(1e3 * float(np.median(whole)), 2),
        "process_ms_mean": round(1e3 * float(np.mean(whole)), 2),
        "wakeups": round(num_wakeups / num_steps, 1),
    }


def random_token(request: Request, stop_id: int, rng: np.random.Generator) -> int:
    mask = np.array(request.constraint.mask, dtype=np.int32)  # type: ignore[union-attr]
    allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    allowed = allowed[allowed != stop_id]
    return int(allowed[rng.integers(len(allowed))])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--vocab-size", type=int, default=128256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--label", default="", help="tells builds apart")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as folder:
        write_tokenizer(Path(folder), args.vocab_size)
        vocabulary = Vocabulary(load_tokenizer(Path(folder)), args.vocab_size)
    for _ in range(args.rounds):
        row = {
            "benchmark": "benchmarks/grammar_masks.py", "label": args.label,
            "machine": f"{os.cpu_count()}-core CPU machine", "load": os.getloadavg()[0],
            "rows": args.rows, "steps": args.steps, "vocab_size": args.vocab_size,
            "schemas": NUM_SCHEMAS, "unit": "ms of CPU time a step, medians",
            **measure(vocabulary, args.rows, args.steps, args.vocab_size - 1),
        }  # fmt: skip
        print(json.dumps(row), flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
