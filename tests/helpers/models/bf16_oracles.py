"""Judges an engine in bf16 by Hugging Face + PEFT on the same device, a GPU unless told otherwise.

The engine answers greedily; the oracle then judges every token of every answer, and every prompt
token, in one forward pass over what the engine saw. bf16 rounds, and the same oracle in fp32 says
by how much: `noise` is twice the oracle's own error at a token, or three times its root mean square
over the sequence if that is more. Where the oracle's two best tokens lie further apart than that,
the engine must have chosen the same one; where they do not, its log-probabilities must lie within
0.05 of the oracle's, or within the noise. One token in a thousand may stray further, since the
errors have long tails. Over all tokens the engine must be as near to fp32 as the oracle is.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from loraplex import LLM, LoRARequest, SamplingParams
from loraplex.engine.checkpoint.locate import resolve_model
from loraplex.engine.tokenizer.loading import load_tokenizer

from helpers.models.hf_models import make_hf_model
from helpers.models.peft_oracle import Case, PeftOracle, adapter_names, make_adapters

DEVICE = "cuda"
NUM_NEW_TOKENS = 40
TOLERANCE = 0.05
STRENGTH = 0.3
TRAINED = Path(__file__).parents[3] / "examples" / "adapters"
TEXT = (Path(__file__).parents[3] / "LICENSE").read_text()
MODELS: dict[str, dict[str, int]] = {
    "smollm2": {},
    "llama3": {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2,
               "head_dim": 64, "intermediate_size": 1024},
    "qwen3": {"hidden_size": 384, "num_attention_heads": 8, "num_key_value_heads": 4,
              "head_dim": 128, "intermediate_size": 1000},
}  # fmt: skip


class Oracles:
    """A model and its adapters in bf16, the oracle, and in fp32, which bounds the oracle's noise.

    The packaged model has its trained adapters and English prompts. Models of random weights have
    random adapters of every kind and random prompts. `sizes` are fields of the Hugging Face config
    and replace those of MODELS.
    """

    def __init__(
        self, name: str, root: Path, *, device: str = DEVICE, sizes: dict[str, int] | None = None
    ) -> None:
        self.device = device
        self.path = "" if name == "smollm2" else str(root / "base")
        if self.path and not Path(self.path).exists():
            make_hf_model(name, Path(self.path), seed=3, **(sizes or MODELS[name]))
        judge = self._load()
        exact = copy.deepcopy(judge).to(
            torch.float32
        )  # of the same weights: only the arithmetic differs
        if self.path:
            self.adapters, self.names = root / "adapters", adapter_names()
            make_adapters(exact, self.adapters, strength=STRENGTH)
            generator = torch.Generator().manual_seed(11)
            tokens = torch.randint(0, judge.config.vocab_size, (700,), generator=generator).tolist()
        else:
            self.adapters = TRAINED
            self.names = sorted(path.parent.name for path in TRAINED.glob("*/adapter_config.json"))
            tokens = load_tokenizer(resolve_model("")).encode(TEXT)
        self.prompts = [
            tuple(tokens[at : at + n])
            for at, n in ((90, 1), (91, 2), (93, 17), (110, 64), (80, 600))
        ]
        self.judge, self.exact = (
            PeftOracle(root, self.adapters, model=model, names=self.names, device=device)
            for model in (judge, exact)
        )  # fmt: skip

    def _load(self) -> PreTrainedModel:
        if self.path:
            source, options = self.path, {}
        else:
            file = resolve_model("")
            source, options = file.parent, {"gguf_file": file.name}
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **options)

    def cases(self) -> list[Case]:
        return [Case(name, prompt) for prompt in self.prompts for name in ("", *self.names)]


@dataclass(frozen=True)
class Noise:
    """Root mean squares of the errors of log-probabilities, against fp32."""

    of_engine: float
    of_oracle: float


def run(
    oracles: Oracles, cases: list[Case], *, repeat: int = 1, **options: Any
) -> tuple[list[Any], dict[str, Any]]:
    """Returns the outputs of an engine's last repetition, and its stats with `adapter_pages`."""
    with start(oracles, **options) as llm:
        for _ in range(repeat):
            outputs = answer(llm, cases)
        return outputs, stats_of(llm)


def start(oracles: Oracles, **options: Any) -> LLM:
    """Returns an engine with the adapters of the oracles."""
    adapters = {name: str(oracles.adapters / name) for name in oracles.names}
    options = {
        "in_process": True,
        "pool_bytes": 1 << 30,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 4096,
    } | options
    if "num_pages" in options:
        del options["pool_bytes"]
    return LLM(
        oracles.path, adapters=adapters, dtype="bfloat16", device=oracles.device,
        skip_tokenizer_init=True, **options,
    )  # fmt: skip


def answer(llm: LLM, cases: list[Case], **sampling: Any) -> list[Any]:
    """Returns the greedy answers, with log-probabilities of prompts and answers by default."""
    values = {
        "temperature": 0.0, "max_tokens": NUM_NEW_TOKENS, "ignore_eos": True, "detokenize": False,
        "logprobs": 1, "prompt_logprobs": 1,
    } | sampling  # fmt: skip
    return llm.generate(
        [{"prompt_token_ids": case.prompt} for case in cases],
        SamplingParams(**values),
        lora_request=[LoRARequest(c.adapter, 1) if c.adapter else None for c in cases],
        use_tqdm=False,
    )


def stats_of(llm: LLM) -> dict[str, Any]:
    """Returns the stats, with `adapter_pages`."""
    pages = sum(adapter["num_pages"] for adapter in llm.client.list_adapters())
    return llm.client.stats() | {"adapter_pages": pages}


def judge(oracles: Oracles, cases: list[Case], outputs: list[Any]) -> Noise:
    """Prints the errors. Raises AssertionError unless they are within the noise of bf16."""
    num_decided = 0
    strays = []
    ours, theirs = [], []  # errors of chosen tokens' log-probabilities, against fp32
    for case, output in zip(cases, outputs, strict=True):
        answer = list(output.outputs[0].token_ids)
        assert len(answer) == NUM_NEW_TOKENS
        tokens = [*case.prompt, *answer]
        want = oracles.judge.logits(case, tokens[:-1]).log_softmax(-1)
        exact = oracles.exact.logits(case, tokens[:-1]).log_softmax(-1)
        best = want.topk(2)
        chosen = torch.tensor(tokens[1:], device=want.device)[:, None]
        judged = torch.cat([best.indices, chosen], dim=1)
        errors = (want - exact).gather(1, judged)
        noise = torch.maximum(2 * errors.abs().amax(1), 3 * errors.square().mean().sqrt()).tolist()
        gaps = (best.values[:, 0] - best.values[:, 1]).tolist()
        tops, wanted = best.indices[:, 0].tolist(), want.gather(1, chosen)[:, 0].tolist()
        truth = exact.gather(1, chosen)[:, 0].tolist()
        entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        for i, entry in enumerate(entries):
            where = (case.adapter, len(case.prompt), i)
            got = entry[tokens[i + 1]].logprob
            bound = max(TOLERANCE, noise[i])
            if gaps[i] > 2 * bound:
                first = next(token for token, value in entry.items() if value.rank == 1)
                num_decided += 1
                if first != tops[i]:
                    strays.append((*where, "top-1", gaps[i], bound))
            if abs(got - wanted[i]) > 2 * bound:
                strays.append((*where, got, wanted[i], bound))
            ours.append(got - truth[i])
            theirs.append(wanted[i] - truth[i])
    error, floor = (torch.tensor(values).square().mean().sqrt().item() for values in (ours, theirs))
    largest = max(abs(value) for value in ours)
    print(
        f"{len(ours)} tokens, {num_decided} decided, {len(strays)} astray, "
        f"error {error:.4f} (at most {largest:.3f}), the oracle's {floor:.4f}"
    )
    assert len(strays) <= len(ours) // 1000, strays
    assert error <= 1.25 * floor + 1e-3
    assert num_decided > len(ours) // 2, "the oracle decides too few tokens for a test"
    return Noise(error, floor)
