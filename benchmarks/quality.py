"""Measures what each way to store fewer bytes costs in quality, on the packaged SmolLM2.

Every option reads the same windows of a free text (the topics of Python's own documentation, which
each Python brings along, or `--text`), under the base model and under trained adapters. For each
option and model it gives the perplexity, its ratio to that of `plain`, the mean and the largest
error of a token's log-probability against `plain`, and the share of places where the best token
is the same. Runs on a CPU too, where numbers are rounded as on a GPU.

    python benchmarks/quality.py --out benchmarks/results/quality.jsonl
"""

import argparse
import json
import math
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from loraplex import LLM, LoRARequest, SamplingParams
from loraplex.engine.checkpoint.locate import resolve_model
from loraplex.engine.tokenizer.loading import load_tokenizer

OPTIONS: dict[str, dict[str, str]] = {
    "plain": {},
    "fp8 weights": {"quantization": "fp8"},
    "fp8 kv": {"kv_cache_dtype": "fp8"},
    "fp8 adapters": {"adapter_dtype": "fp8"},
    "fp8 weights, fp8 kv": {"quantization": "fp8", "kv_cache_dtype": "fp8"},
}
ADAPTERS = Path(__file__).resolve().parents[1] / "examples" / "adapters"


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of a text's tokens, and the best token of each place."""

    logprobs: list[float]
    best: list[int]

    @property
    def perplexity(self) -> float:
        return math.exp(-statistics.fmean(self.logprobs))


def read_windows(options: argparse.Namespace) -> list[list[int]]:
    """Returns windows of token ids, equally far apart in the text."""
    text = Path(options.text).read_text("utf-8") if options.text else "\n".join(topics.values())
    tokens = load_tokenizer(resolve_model(options.model)).encode(text)
    step = (len(tokens) - options.window) // options.num_windows
    if step < 1:
        raise SystemExit(f"the text has {len(tokens)} tokens: lower --window or --num-windows")
    return [tokens[i * step :][: options.window] for i in range(options.num_windows)]


def measure(
    option: str, windows: list[list[int]], adapters: list[str], options: argparse.Namespace
) -> dict[str, Scores]:
    """Returns the scores of the base ("") and of each adapter."""
    with LLM(
        options.model, adapters={name: str(ADAPTERS / name) for name in adapters},
        dtype=options.dtype, device=options.device, in_process=True, skip_tokenizer_init=True,
        max_num_seqs=8, max_num_batched_tokens=max(8, options.window), **OPTIONS[option],
    ) as llm:  # fmt: skip
        return {name: score(llm, windows, name) for name in ("", *adapters)}


def score(llm: LLM, windows: list[list[int]], adapter: str) -> Scores:
    outputs = llm.generate(
        [{"prompt_token_ids": window} for window in windows],
        SamplingParams(temperature=0, max_tokens=1, detokenize=False, prompt_logprobs=1),
        lora_request=[LoRARequest(adapter)] * len(windows) if adapter else None,
        use_tqdm=False,
    )
    logprobs, best = [], []
    for window, output in zip(windows, outputs, strict=True):
        for token, entry in zip(window[1:], output.prompt_logprobs[1:], strict=True):
            logprobs.append(entry[token].logprob)
            best.append(next(t for t, value in entry.items() if value.rank == 1))
    return Scores(logprobs, best)


def compare(got: Scores, plain: Scores) -> dict[str, float]:
    errors = [abs(a - b) for a, b in zip(got.logprobs, plain.logprobs, strict=True)]
    same = [a == b for a, b in zip(got.best, plain.best, strict=True)]
    return {
        "perplexity": round(got.perplexity, 4),
        "of_plain": round(got.perplexity / plain.perplexity, 5),
        "mean_error": round(statistics.fmean(errors), 5),
        "largest_error": round(max(errors), 4),
        "same_best": round(statistics.fmean(same), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="model directory; empty: the packaged SmolLM2")
    parser.add_argument("--adapters", default="chef,json,pirate", help="of examples/adapters")
    parser.add_argument("--options", default="|".join(OPTIONS), help="names, divided by |")
    parser.add_argument("--text", default="", help="file in UTF-8; empty: Python's documentation")
    parser.add_argument("--num-windows", type=int, default=64)
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    options = parser.parse_args()
    adapters = [name for name in options.adapters.split(",") if name]
    windows = read_windows(options)
    is_gpu = torch.cuda.is_available() and options.device != "cpu"
    machine: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if is_gpu else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dtype": options.dtype,
        "model": options.model or "SmolLM2-135M-Instruct",
        "text": options.text or "pydoc_data.topics",
        "num_windows": len(windows),
        "window": options.window,
    }
    print(machine)
    print(f"{'option':20} {'adapter':10} perplexity  of plain  mean error  largest  same best")
    plain: dict[str, Scores] = {}
    for option in options.options.split("|"):
        started = time.perf_counter()
        found = measure(option, windows, adapters, options)
        plain = plain or found
        seconds = round(time.perf_counter() - started, 1)
        for adapter, scores in found.items():
            row = compare(scores, plain[adapter])
            print(
                f"{option:20} {adapter or 'base':10} {row['perplexity']:10} {row['of_plain']:9} "
                f"{row['mean_error']:11} {row['largest_error']:8} {row['same_best']:10}",
                flush=True,
            )
            if options.out:
                line = {**machine, "option": option, "adapter": adapter or None, **row}
                with options.out.open("a") as file:
                    file.write(json.dumps(line | {"option_seconds": seconds}) + "\n")


if __name__ == "__main__":
    main()
