"""Fine-tunes an adapter by policy gradient, and samples from the engine after every step.

    pip install peft transformers
    python examples/reinforce.py [--letter e] [--steps 30]

The reward of an answer is the share of its tokens that hold a letter. Each step loads the adapter
from the trainer's memory into the engine, samples answers from it, and makes those likelier that
are better than the mean (REINFORCE with a baseline, Williams 1992). No file is written.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from loraplex import LLM, LoRARequest, SamplingParams
from loraplex.engine.checkpoint.locate import resolve_model

NAME = "policy"
PROMPT = "Once upon a time"
Reward = Callable[[list[int]], float]


@dataclass(frozen=True)
class Step:
    """Mean reward of one step's answers, and the time until the engine had the new weights."""

    reward: float
    load_ms: float
    answer: str


def load_policy(model: str) -> PeftModel:
    """Returns the base model in float32 with a new adapter, which changes nothing yet."""
    path = Path(resolve_model(model))
    where = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    base = AutoModelForCausalLM.from_pretrained(where[0], dtype=torch.float32, **where[1])
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def letter_reward(llm: LLM, letter: str) -> Reward:
    """Returns the share of an answer's tokens whose text holds the letter."""
    tokenizer = llm.get_tokenizer()

    def reward(token_ids: list[int]) -> float:
        texts = [tokenizer.decode([token_id]) for token_id in token_ids]
        return sum(letter in text for text in texts) / max(1, len(texts))

    return reward


def train(
    llm: LLM, policy: PeftModel, reward: Reward, *, steps: int, samples: int, max_tokens: int,
    learning_rate: float,
) -> Iterator[Step]:  # fmt: skip
    """Yields each step after its answers were rewarded and learned from."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, learning_rate)
    for number in range(steps):
        started = time.monotonic()
        llm.load_adapter(NAME, policy)
        load_ms = (time.monotonic() - started) * 1000
        params = SamplingParams(n=samples, temperature=1.0, max_tokens=max_tokens, seed=number)
        (output,) = llm.generate(PROMPT, params, lora_request=LoRARequest(NAME), use_tqdm=False)
        answers = [list(answer.token_ids) for answer in output.outputs]
        rewards = torch.tensor([reward(answer) for answer in answers])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        assert output.prompt_token_ids is not None
        likelihoods = log_likelihoods(policy, list(output.prompt_token_ids), answers)
        optimizer.zero_grad()
        (-(advantages * likelihoods).mean() / max_tokens).backward()
        optimizer.step()
        yield Step(float(rewards.mean()), load_ms, output.outputs[0].text)


def log_likelihoods(policy: PeftModel, prompt: list[int], answers: list[list[int]]) -> torch.Tensor:
    """Returns the log-likelihood of each answer after the prompt: float32 [answers]."""
    longest = max(map(len, answers))
    ids = torch.tensor([prompt + answer + [0] * (longest - len(answer)) for answer in answers])
    is_answer = torch.tensor([[i < len(answer) for i in range(longest)] for answer in answers])
    logits = policy(ids).logits[:, len(prompt) - 1 : -1]
    chosen = logits.log_softmax(-1).gather(-1, ids[:, len(prompt) :, None])[..., 0]
    return (chosen * is_answer).sum(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="", help="a model's folder; default: SmolLM2-135M")
    parser.add_argument("--letter", default="e")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    policy = load_policy(args.model)
    with LLM(args.model, dtype="float32") as llm:
        steps = train(
            llm, policy, letter_reward(llm, args.letter), steps=args.steps, samples=args.samples,
            max_tokens=args.max_tokens, learning_rate=args.learning_rate,
        )  # fmt: skip
        for number, step in enumerate(steps):
            text = " ".join(step.answer.split())[:60]
            print(
                f"step {number:3}: reward {step.reward:.2f}, loaded in {step.load_ms:4.0f} ms: "
                f"{text}",
                flush=True,
            )


if __name__ == "__main__":
    main()
