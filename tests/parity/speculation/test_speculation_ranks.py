"""Drafts on two worker ranks, over gloo: the answers are those of one rank without drafts."""

from pathlib import Path
from typing import Any

from loraplex import LLM, LoRARequest, SamplingParams

from helpers.models.hf_models import make_hf_model
from helpers.models.peft_adapters import make_adapter

FEW = dict.fromkeys((40, 41, 42, 43), 30.0)
"""Biases with which an answer is made of four tokens, so that it repeats itself."""


def run(base: Path, adapter: Path, **options: Any) -> tuple[list[list[int]], int]:
    """Returns the answers, and how many of their tokens were drafted."""
    with LLM(
        str(base), adapters={"a": str(adapter)}, device="cpu", dtype="float32",
        skip_tokenizer_init=True, num_pages=60, block_tokens=8, max_num_seqs=6, **options,
    ) as llm:  # fmt: skip
        outputs = llm.generate(
            [{"prompt_token_ids": [40, 41, 42, 43, 40, 41, 42, 43, 40]}] * 4,
            [
                SamplingParams(
                    temperature=temperature, seed=3, max_tokens=40, ignore_eos=True,
                    detokenize=False, logit_bias=FEW,
                )
                for temperature in (0.0, 0.3, 0.0, 0.3)
            ],
            lora_request=[None, None, LoRARequest("a"), LoRARequest("a")],
            use_tqdm=False,
        )  # fmt: skip
        answers = [list(output.outputs[0].token_ids) for output in outputs]
        return answers, llm.client.stats()["num_accepted_tokens"]


def test_all_ranks_accept_the_same_tokens(tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = make_hf_model("llama", base, seed=3, num_hidden_layers=2, vocab_size=509)
    adapter = make_adapter(model, tmp_path / "a", seed=5, r=8, alpha=16, targets="all-linear")
    ngram = {"method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_max": 2}
    expected, num_accepted = run(base, adapter, in_process=True)
    assert not num_accepted
    answers, num_accepted = run(base, adapter, tensor_parallel_size=2, speculative_config=ngram)
    assert answers == expected
    assert num_accepted > 10
