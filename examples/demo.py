"""Answers one prompt with the base model and every adapter in examples/adapters, in one batch.

    python examples/demo.py ["another prompt" ...]

The engine runs as under `loraplex serve`: frontend, scheduler and worker are separate processes.
It uses a GPU if there is one, else the CPU.
"""

import sys
import time
from pathlib import Path

from loraplex import LLM, LoRARequest, SamplingParams
from loraplex.entrypoints.cli.generate import BASE, print_answers

ADAPTERS = Path(__file__).resolve().parent / "adapters"
CONSOLE = """\
Chat with them in a browser, and watch the pool of pages:
    .venv/bin/loraplex serve --adapter-dir examples/adapters --http 127.0.0.1:8000
and open http://127.0.0.1:8000/"""
PROMPTS = ["What is the capital of France?"]


def main(prompts: list[str]) -> None:
    started = time.monotonic()
    params = SamplingParams(temperature=0.0, max_tokens=60)
    with LLM(adapter_dir=str(ADAPTERS)) as llm:
        adapters = sorted(str(adapter["name"]) for adapter in llm.client.list_adapters())
        worker = llm.info.workers[0]
        print(
            f"\nSmolLM2-135M-Instruct on {worker.device}, started in "
            f"{time.monotonic() - started:.1f} s, with {len(adapters)} adapters\n"
        )
        names = [BASE, *adapters]
        requests = [(prompt, name) for prompt in prompts for name in names]
        started = time.monotonic()
        outputs = llm.chat(
            [[{"role": "user", "content": prompt}] for prompt, _ in requests],
            params,
            lora_request=[None if name == BASE else LoRARequest(name) for _, name in requests],
            use_tqdm=False,
        )
        elapsed = time.monotonic() - started
    for index, prompt in enumerate(prompts):
        start = index * len(names)
        print_answers(prompt, names, outputs[start : start + len(names)])
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(
        f"{len(requests)} answers, {num_tokens} tokens in {elapsed:.1f} s, "
        "the base model and all adapters in one batch\n"
    )
    print(CONSOLE)


if __name__ == "__main__":
    main(sys.argv[1:] or PROMPTS)
