"""Adapters with tokens and a tokenizer of their own, against Hugging Face and PEFT.

The base model has 400 rows and its tokenizer 384 tokens, so the tokens of one adapter lie within
the padding and those of the other behind it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from loraplex import LLM, LoRARequest, SamplingParams
from loraplex.engine.errors import AdapterError, ClientError
from loraplex.engine.frontend.structured.structured_outputs import StructuredOutputsParams

from helpers.models.hf_models import make_hf_model, make_tokenizer
from helpers.models.peft_adapters import make_adapter
from helpers.models.peft_oracle import Case
from helpers.models.peft_oracles import PeftOracles
from helpers.vocabularies.extended_tokenizers import extend_tokenizer
from helpers.vocabularies.resized_models import make_resized_adapter

NUM_ROWS = 400
OWN = ["inside", "behind"]
TOKENS = ["<tool>", "<|end|>", "<|call|>"]
MORE = [f"<t{i}>" for i in range(40)]
TEXT = "the <tool> capital<|call|> of <t3> France"
MESSAGES = [{"role": "user", "content": "a <t3> page<|call|>"}]
TOOL, END, CALL, LAST = 384, 385, 386, 384 + 42
RANK: dict[str, Any] = {"r": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> PeftOracles:
    root = tmp_path_factory.mktemp("tokenizers")
    base, adapters = root / "base", root / "adapters"
    model = make_hf_model("llama", base, vocab_size=NUM_ROWS)
    make_tokenizer(base)
    make_adapter(model, adapters / "lora", **RANK)
    saved = {"modules_to_save": ["embed_tokens", "lm_head"], "saved_tokens": (384, 385, 386)}
    make_adapter(model, adapters / "inside", seed=1, **RANK, **saved)
    extend_tokenizer(base, adapters / "inside", TOKENS)
    make_resized_adapter(base, adapters / "behind", LAST + 1, seed=2, **RANK)
    extend_tokenizer(base, adapters / "behind", TOKENS + MORE)
    resized = {"behind": LAST + 1}
    return PeftOracles(base, adapters, groups=[["lora"], ["inside"]], resized=resized)


@pytest.fixture(scope="module")
def llm(oracle: PeftOracles) -> Iterator[LLM]:
    with LLM(
        str(oracle.base), device="cpu", dtype="float32", in_process=True, num_pages=512,
        adapters={name: str(oracle.adapters / name) for name in ("lora", *OWN)},
    ) as llm:  # fmt: skip
        yield llm


def tokenizer(oracle: PeftOracles, name: str) -> Any:
    folder = oracle.adapters / name if name in OWN else oracle.base
    return AutoTokenizer.from_pretrained(folder)


def greedy(**values: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, **{"max_tokens": 8, "ignore_eos": True, **values})


def ask(llm: LLM, prompt: Any, names: list[str], **values: Any) -> list[Any]:
    requests = [LoRARequest(name) if name else None for name in names]
    prompts = [prompt] * len(names)
    return llm.generate(prompts, greedy(**values), lora_request=requests, use_tqdm=False)


def test_texts_of_one_batch(llm: LLM, oracle: PeftOracles) -> None:
    names = ["", "lora", *OWN]
    outputs = ask(llm, TEXT, names, skip_special_tokens=False)
    for name, output in zip(names, outputs, strict=True):
        own, ids = tokenizer(oracle, name), list(output.outputs[0].token_ids)
        assert output.prompt_token_ids == own.encode(TEXT)
        case = Case(name, tuple(output.prompt_token_ids))
        assert ids == oracle.choices(case, ids), name
        assert output.outputs[0].text == own.decode(ids, skip_special_tokens=False)
    assert {TOOL, CALL} <= set(outputs[2].prompt_token_ids) & set(outputs[3].prompt_token_ids)
    assert max(outputs[3].prompt_token_ids) >= 387 > max(outputs[1].prompt_token_ids)


def test_chats_use_the_adapters_template(llm: LLM, oracle: PeftOracles) -> None:
    for name in ("", *OWN):
        request = LoRARequest(name) if name else None
        (output,) = llm.chat([MESSAGES], greedy(), lora_request=request, use_tqdm=False)
        own = tokenizer(oracle, name)
        text = own.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
        assert output.prompt_token_ids == own.encode(text, add_special_tokens=False)


def test_an_added_token_ends_the_answer(llm: LLM) -> None:
    bias = {"logit_bias": {END: 100.0}, "ignore_eos": False}
    for output in ask(llm, TEXT, OWN, **bias):
        assert output.outputs[0].finish_reason == "stop"
        assert list(output.outputs[0].token_ids) == [END]
        assert output.outputs[0].text == ""
    (output,) = ask(llm, TEXT, ["behind"], logit_bias={LAST: 100.0}, stop_token_ids=[LAST])
    assert output.outputs[0].stop_reason == LAST
    (output,) = ask(llm, TEXT, ["behind"], logit_bias={LAST: 100.0}, bad_words=["<t39>"])
    assert LAST not in output.outputs[0].token_ids


def test_allowed_tokens_and_random_draws(llm: LLM) -> None:
    values = {"temperature": 1.0, "n": 3, "seed": 5, "allowed_token_ids": [CALL, LAST, 7]}
    requests = [LoRARequest("behind"), None]
    params = [
        SamplingParams(max_tokens=12, ignore_eos=True, **values),
        SamplingParams(max_tokens=12, ignore_eos=True, **{**values, "allowed_token_ids": [7]}),
    ]
    own, base = llm.generate([TEXT, TEXT], params, lora_request=requests, use_tqdm=False)
    drawn = [set(output.token_ids) for output in own.outputs]
    assert set().union(*drawn) == {CALL, LAST, 7}
    assert all(set(output.token_ids) == {7} for output in base.outputs)


def test_log_probabilities_of_added_tokens(llm: LLM, oracle: PeftOracles) -> None:
    (output,) = ask(llm, TEXT, ["behind"], prompt_logprobs=0, logprobs=128, max_tokens=1)
    ids = list(output.prompt_token_ids)
    logits = oracle.logits(Case("behind", tuple(ids)), ids).log_softmax(dim=-1)
    for position, entry in enumerate(output.prompt_logprobs[1:]):
        token_id = ids[position + 1]
        expected = float(logits[position, token_id])
        assert entry[token_id].logprob == pytest.approx(expected, abs=1e-4)
    tool = next(entry for entry in output.prompt_logprobs[1:] if TOOL in entry)
    assert tool[TOOL].decoded_token == "<tool>"
    best = output.outputs[0].logprobs[0]
    assert set(logits[-1].topk(128).indices.tolist()) == set(best)
    assert any(token_id >= NUM_ROWS for token_id in best)
    for token_id, entry in best.items():
        assert entry.logprob == pytest.approx(float(logits[-1, token_id]), abs=1e-4)


def test_grammars_of_two_vocabularies(llm: LLM) -> None:
    names = ["behind", "", "inside", "lora"]
    choice = StructuredOutputsParams(choice=["<tool> yes", "<tool> no"])
    outputs = ask(llm, TEXT, names, structured_outputs=choice, max_tokens=40, ignore_eos=False)
    for name, output in zip(names, outputs, strict=True):
        assert output.outputs[0].text in ("<tool> yes", "<tool> no"), name
    bias = {"logit_bias": {TOOL: 50.0}, "max_tokens": 40, "ignore_eos": False}
    for output in ask(llm, TEXT, OWN, structured_outputs=choice, **bias):
        assert output.outputs[0].token_ids[0] == TOOL
        assert output.outputs[0].text in ("<tool> yes", "<tool> no")


@pytest.mark.parametrize("name", ["", "lora", "inside"])
def test_other_requests_do_not_have_the_tokens(llm: LLM, name: str) -> None:
    for prompt, values in (
        ({"prompt_token_ids": [5, NUM_ROWS]}, {}),
        (TEXT, {"stop_token_ids": [NUM_ROWS]}),
        (TEXT, {"logit_bias": {NUM_ROWS: 1.0}}),
    ):
        with pytest.raises(ClientError, match="token id 400 is outside the vocabulary of 400"):
            ask(llm, prompt, [name], **values)
    with pytest.raises(ClientError, match="token id 427 is outside the vocabulary of 427"):
        ask(llm, {"prompt_token_ids": [5, LAST + 1]}, ["behind"])


def test_a_tokenizer_that_is_refused(llm: LLM, oracle: PeftOracles, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in (oracle.adapters / "inside").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    renumbered, rowless = copy("renumbered"), copy("rowless")
    make_tokenizer(renumbered, vocab_size=300)
    extend_tokenizer(oracle.base, rowless, [*TOKENS, *MORE])
    for folder, reason in (
        (renumbered, "does not extend the base model's: token 300 is None"),
        (rowless, "has the token '<t13>' with id 400, but the adapter has rows for 400 tokens"),
    ):
        request = LoRARequest(folder.name, 1, str(folder))
        with pytest.raises(AdapterError, match=f"adapter '{folder.name}': .*{reason}"):
            llm.generate(["x"], greedy(), lora_request=request, use_tqdm=False)


def test_an_adapter_that_is_replaced(llm: LLM, oracle: PeftOracles) -> None:
    """The frontend has the former one's vocabulary, and is told of the new one's."""
    for name in ("behind", "lora", "inside", "behind"):
        path = str(oracle.adapters / name)
        request = LoRARequest("swapped", 1, path, load_inplace=True)
        (output,) = llm.generate([TEXT], greedy(), lora_request=request, use_tqdm=False)
        assert output.prompt_token_ids == tokenizer(oracle, name).encode(TEXT)
        ids = list(output.outputs[0].token_ids)
        assert ids == oracle.choices(Case(name, tuple(output.prompt_token_ids)), ids)
