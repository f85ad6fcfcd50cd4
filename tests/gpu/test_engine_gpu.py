"""The engine on a GPU in bf16, against Hugging Face + PEFT on the same GPU.

The engine answers greedily; the oracle then judges every token of every answer, and every prompt
token, in one forward pass over what the engine saw. bf16 rounds: where the oracle's two best
tokens lie further apart than the noise, the engine must have chosen the same one, and its
log-probabilities must lie within 0.05 of the oracle's, or within the oracle's own distance from
fp32 at that position if that is larger.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from loraplex import LLM, LoRARequest, SamplingParams
from loraplex.backends import registry

from helpers.hf_models import make_hf_model
from helpers.peft_oracle import Case, PeftOracle, adapter_names, make_adapters, make_cases

pytestmark = pytest.mark.gpu

NUM_NEW_TOKENS = 16
TOLERANCE = 0.05
LENGTHS = (1, 2, 17, 64, 600)
MODELS = {
    "smollm2": {},
    "llama3": {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2,
               "head_dim": 64, "intermediate_size": 1024},
    "qwen3": {"hidden_size": 384, "num_attention_heads": 8, "num_key_value_heads": 4,
              "head_dim": 128, "intermediate_size": 1000},
}  # fmt: skip
BACKENDS = [("torch", "torch"), ("xformers", "torch"), ("torch", "triton"), ("xformers", "cupy")]
VARIANTS = {
    "plain": {},
    "chunked": {"max_num_seqs": 16, "max_num_batched_tokens": 37},
    "preempted": {"num_pages": 620, "max_num_seqs": 64},
    "one step in flight": {"max_steps_in_flight": 1},
}


class Oracles:
    """The same model and adapters in bf16, which judges, and in fp32, which bounds its noise."""

    def __init__(self, name: str, root) -> None:
        self.model_path = "" if name == "smollm2" else str(root / "base")
        models = {dtype: self._load(name, root, dtype) for dtype in (torch.bfloat16, torch.float32)}
        make_adapters(models[torch.float32], root / "adapters")
        self.adapters = root / "adapters"
        self.judge, self.exact = (
            PeftOracle(root, self.adapters, num_new_tokens=0, model=model, device="cuda")
            for model in models.values()
        )

    def _load(self, name: str, root, dtype: torch.dtype):
        if name == "smollm2":
            from loraplex.engine.models.packaged import resolve_model

            path = resolve_model("")
            return AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.bfloat16
            ).to(dtype)
        if not (root / "base").exists():
            make_hf_model(name, root / "base", seed=3, **MODELS[name])
        return AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.bfloat16).to(dtype)


@pytest.fixture(scope="module", params=MODELS)
def oracles(request, tmp_path_factory):
    return Oracles(request.param, tmp_path_factory.mktemp(request.param))


def run(oracles: Oracles, cases: list[Case], **options) -> tuple[list, dict]:
    adapters = {name: str(oracles.adapters / name) for name in adapter_names()}
    options = {"pool_bytes": 2 << 30, "max_num_seqs": 64, "max_num_batched_tokens": 4096} | options
    if "num_pages" in options:
        del options["pool_bytes"]
    with LLM(
        oracles.model_path, adapters=adapters, dtype="bfloat16", device="cuda", in_process=True,
        skip_tokenizer_init=True, **options,
    ) as llm:  # fmt: skip
        outputs = llm.generate(
            [{"prompt_token_ids": case.prompt} for case in cases],
            SamplingParams(
                temperature=0.0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True, detokenize=False,
                logprobs=1, prompt_logprobs=1,
            ),
            lora_request=[LoRARequest(c.adapter, 1) if c.adapter else None for c in cases],
            use_tqdm=False,
        )  # fmt: skip
        return outputs, llm.client.stats()


def judge(oracles: Oracles, cases: list[Case], outputs: list) -> None:
    num_decided = num_tokens = 0
    for case, output in zip(cases, outputs, strict=True):
        answer = list(output.outputs[0].token_ids)
        assert len(answer) == NUM_NEW_TOKENS
        tokens = [*case.prompt, *answer]
        want = oracles.judge.logits(case, tokens[:-1]).log_softmax(-1)
        exact = oracles.exact.logits(case, tokens[:-1]).log_softmax(-1)
        noise = (want - exact).abs()
        entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        for i, entry in enumerate(entries):
            token = tokens[i + 1]
            top = want[i].topk(2)
            gap = float(top.values[0] - top.values[1])
            unsure = max(TOLERANCE, 2 * float(noise[i, top.indices].max()))
            first = next(t for t, value in entry.items() if value.rank == 1)
            if gap > 2 * unsure:
                assert first == int(top.indices[0]), (case.adapter, len(case.prompt), i, gap)
                num_decided += 1
            difference = abs(entry[token].logprob - float(want[i, token]))
            bound = max(TOLERANCE, 2 * float(noise[i].max()))
            assert difference <= bound, (case.adapter, len(case.prompt), i, difference, bound)
            num_tokens += 1
    assert num_decided > num_tokens // 2, "the oracle decides too few tokens for a test"


@pytest.mark.parametrize("variant", VARIANTS)
def test_parity(oracles, variant):
    cases = make_cases(oracles.judge, lengths=LENGTHS)
    outputs, stats = run(oracles, cases, **VARIANTS[variant])
    judge(oracles, cases, outputs)
    assert stats["running"] == stats["waiting"] == 0


@pytest.mark.parametrize(("attention", "lora"), BACKENDS)
def test_backends(oracles, attention, lora):
    for op, name in (("attention", attention), ("lora", lora)):
        reason = next(b for b in registry.list_backends(op) if b.name == name).probe()
        if reason:
            pytest.skip(f"{name}: {reason}")
    cases = make_cases(oracles.judge, lengths=LENGTHS)
    outputs, _ = run(oracles, cases, attention_backend=attention, lora_backend=lora)
    judge(oracles, cases, outputs)
