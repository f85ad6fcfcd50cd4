"""Measures what constrained rows cost the free rows of the same batch.

Three loads take turns: a batch of free rows, the same with half of them under JSON schemas, and the
free half alone. The free rows' times between tokens are compared. Weights are random. The tokens
are bytes and the words of Python's library, as many as the model's vocabulary has.

    python benchmarks/structured_output.py --model llama-3-8b --out structured.jsonl
"""

import argparse
import json
import re
import statistics
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from loraplex import LLM, SamplingParams, StructuredOutputsParams
from loraplex.engine.config import EngineConfig, ModelConfig
from loraplex.entrypoints.bench import dummy
from loraplex.entrypoints.bench.measure import Timeline
from loraplex.entrypoints.bench.results import Results
from loraplex.entrypoints.client.outputs import RequestFailure
from loraplex.memory.config import MemoryConfig
from loraplex.scheduler.config import SchedulerConfig

LIBRARY_CHARS = 10_000_000
WORDS = re.compile(r" ?[A-Za-z_]+| ?[0-9]{1,3}| ?[^\sA-Za-z0-9_]+|\s+")


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer.json of `vocab_size` tokens, at least the 256 bytes."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocab = {token: i for i, token in enumerate(sorted(byte_level.alphabet()))}
    for word in library_words():
        if len(vocab) >= vocab_size:
            break
        vocab.setdefault(byte_level.pre_tokenize_str(word)[0][0], len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def library_words() -> Iterator[str]:
    """Yields the words of Python's library, the most frequent first, then pairs of them."""
    counts: Counter[str] = Counter()
    num_chars = 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*/*.py")):
        if num_chars < LIBRARY_CHARS and file.parent.name != "site-packages":
            text = file.read_text(errors="ignore")
            num_chars += len(text)
            counts.update(WORDS.findall(text))
    words = [word for word, _ in counts.most_common() if len(word) <= 24]
    yield from words
    yield from map("".join, product(words[:1000], repeat=2))


def schema(number: int) -> dict[str, Any]:
    """Returns a schema whose answers do not end within a run. Numbers differ in the grammar."""
    person = {
        "name": {"type": "string", "maxLength": 12 + number},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 4},
        "note": {"type": "string", "maxLength": 40 + number},
    }
    item = {"type": "object", "properties": person, "required": list(person),
            "additionalProperties": False}  # fmt: skip
    return {"type": "array", "minItems": 1000, "items": item}


def run(llm: LLM, args: argparse.Namespace, num_free: int, num_bound: int, seed: int) -> dict:
    """Returns the times between tokens of the free and of the constrained rows, in ms."""
    rng = np.random.default_rng(seed)
    client, timelines = llm.client, {}
    start = time.perf_counter()
    for row in range(num_free + num_bound):
        is_bound = row >= num_free
        form = StructuredOutputsParams(json=schema(row % args.schemas), disable_any_whitespace=True)
        params = SamplingParams(
            temperature=1.0, seed=seed + row, ignore_eos=not is_bound, detokenize=False,
            # A constrained row takes every other step, so it gets half as far meanwhile.
            max_tokens=args.answer_len // 2 if is_bound else args.answer_len,
            structured_outputs=form if is_bound else None,
            stop_token_ids=[llm.info.vocab_size - 1] if is_bound else None,  # a grammar needs one
        )  # fmt: skip
        prompt = rng.integers(0, llm.info.vocab_size, args.prompt_len).tolist()
        timelines[client.submit(prompt, params, stream=True)] = Timeline(0.0)
    order, left = list(timelines), len(timelines)
    while left:
        for output in client.poll(1.0):
            if isinstance(output, RequestFailure):
                raise output.error
            now, timeline = time.perf_counter() - start, timelines[output.request_id]
            if len(output.outputs[0].token_ids) > timeline.num_tokens:
                timeline.arrivals.append((now, len(output.outputs[0].token_ids)))
            left -= output.finished
    begin = max(timeline.arrivals[0][0] for timeline in timelines.values())
    end = min(timeline.arrivals[-1][0] for timeline in timelines.values())
    groups = {"free": order[:num_free], "bound": order[num_free:]}
    figures: dict[str, float] = {}
    for name, ids in groups.items():
        gaps = [gap for i in ids for gap in timelines[i].gaps_s(begin, end)]
        if gaps:
            p50, p99 = np.percentile(gaps, (50, 99))
            values = {"mean": np.mean(gaps), "p50": p50, "p99": p99}
            figures |= {f"{name}_{k}_ms": round(float(v) * 1e3, 3) for k, v in values.items()}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="tiny", choices=dummy.MODELS)
    parser.add_argument("--vocab-size", type=int, help="instead of the model's own")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--num-pages", type=int)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--schemas", type=int, default=8, help="different ones, dealt in turn")
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--answer-len", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = Results(args.out, None, lambda rows: [])
    half = args.batch // 2
    loads = {
        "free": (args.batch, 0),
        "mixed": (args.batch - half, half),
        "half": (args.batch - half, 0),
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in loads}
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as folder:
        path = dummy.write_model(Path(folder) / "model", args.model)
        shapes = dummy.model_config(args.model)
        shapes["vocab_size"] = args.vocab_size or shapes["vocab_size"]
        (path / "config.json").write_text(json.dumps(shapes))
        write_tokenizer(path, shapes["vocab_size"])
        config = EngineConfig(
            model=ModelConfig(
                model=str(path), load_format="dummy", device=args.device, dtype=args.dtype
            ),
            memory=MemoryConfig(num_pages=args.num_pages),
            scheduler=SchedulerConfig(max_num_seqs=args.batch),
        )
        with LLM.from_config(config) as llm:
            for repeat in range(args.repeats + 1):
                for name, (num_free, num_bound) in loads.items():
                    figures = run(llm, args, num_free, num_bound, seed=1000 * repeat)
                    print(f"{name:6}", figures, flush=True)
                    if repeat:  # the first runs compile kernels and grammars
                        runs[name].append(figures)
            worker = llm.info.workers[0]
    row: dict[str, Any] = {
        "benchmark": "benchmarks/structured_output.py", "model": args.model,
        "vocab_size": shapes["vocab_size"], "device": worker.device,
        "attention_backend": worker.attention_backend, "batch": args.batch, "constrained": half,
        "schemas": args.schemas, "prompt_len": args.prompt_len, "answer_len": args.answer_len,
        "repeats": args.repeats,
    }  # fmt: skip
    for name, all_figures in runs.items():
        for key in all_figures[0]:
            row[f"{name}_{key}"] = statistics.median(figures[key] for figures in all_figures)
    for key in ("mean", "p50"):
        cost = row[f"mixed_free_{key}_ms"] / row[f"free_free_{key}_ms"] - 1
        row[f"cost_{key}"] = round(cost, 4)
    print(json.dumps(row, indent=1))
    results.write(row)


if __name__ == "__main__":
    main()
