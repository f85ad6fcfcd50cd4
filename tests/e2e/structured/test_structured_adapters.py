"""Adapters that ship a tokenizer with another end token, under grammars of the base's tokens."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex import LLM, LoRARequest, SamplingParams, StructuredOutputsParams

from helpers.models.hf_models import make_hf_model, make_tokenizer
from helpers.models.peft_adapters import make_adapter

pytestmark = pytest.mark.e2e
EOS, IM_END = 2, 4  # of the base, and of the adapter
OWN = LoRARequest("own")
NEVER = {EOS: -100.0}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    root = tmp_path_factory.mktemp("own_eos")
    make_tokenizer(root / "base")
    model = make_hf_model("llama", root / "base", seed=5)
    folder = make_adapter(model, root / "own", r=4, alpha=8, targets="all-linear")
    ship_tokenizer(folder, root / "base", eos="<|im_end|>")
    with LLM(
        str(root / "base"), adapters={"own": str(folder)}, device="cpu", num_pages=300,
        max_model_len=512,
    ) as made:  # fmt: skip
        yield made


def ship_tokenizer(folder: Path, base: Path, *, eos: str) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((base / name).read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": eos}))


def answer(llm: LLM, choice: list[str], **params):
    form = StructuredOutputsParams(choice=choice)
    given = SamplingParams(max_tokens=40, temperature=1.0, structured_outputs=form, **params)
    (output,) = llm.generate("Say it.", given, lora_request=OWN, use_tqdm=False)
    return output.outputs[0]


def test_its_end_token_ends_the_text_where_the_request_names_it(llm: LLM) -> None:
    choice = ["yes", "yes, please"]
    for seed in range(6):
        one = answer(llm, choice, seed=seed, stop_token_ids=[IM_END], logit_bias=NEVER)
        assert one.text in choice
        assert (one.finish_reason, one.stop_reason) == ("stop", IM_END)
        assert one.token_ids[-1] == IM_END


def test_its_end_token_is_no_part_of_a_text(llm: LLM) -> None:
    """Without stop_token_ids the end is the base's. The bias would take the adapter's instead."""
    one = answer(llm, ["yes", "no"], seed=1, logit_bias={IM_END: 100.0})
    assert one.text in ("yes", "no") and IM_END not in one.token_ids
    assert one.finish_reason == "stop" and one.token_ids[-1] == EOS


def test_neither_end_token_comes_before_min_tokens(llm: LLM) -> None:
    form = StructuredOutputsParams(regex="a{1,30}")
    wanted = {IM_END: 60.0, EOS: 60.0}
    params = SamplingParams(
        max_tokens=40, min_tokens=8, stop_token_ids=[IM_END], logit_bias=wanted,
        structured_outputs=form,
    )  # fmt: skip
    (output,) = llm.generate("Say it.", params, lora_request=OWN, use_tqdm=False)
    one = output.outputs[0]
    assert one.finish_reason == "stop" and len(one.token_ids) >= 8
    assert not {IM_END, EOS} & set(one.token_ids[:8])
