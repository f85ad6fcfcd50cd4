"""Structured output over the real processes and the packaged SmolLM2-135M-Instruct."""

import json
import random
import threading
from collections.abc import Iterator

import pytest

from loraplex import LLM, SamplingParams, StructuredOutputsParams
from loraplex.engine.errors import ClientError

from helpers.running.random_forms import random_form

pytestmark = pytest.mark.e2e

HOSTILE = {"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(60)]}
PROMPTS = (
    "Describe a person as JSON: ",
    "The answer is",
    "Write anything you like.",
    "Q: red, green or blue?\nA:",
    "1 2 3 4",
    "{",
)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(num_pages=800, max_model_len=1024) as made:
        yield made


def check_random_forms(llm: LLM, count: int) -> None:
    rng = random.Random(count)
    forms = [random_form(rng) for _ in range(count)]
    prompts = [rng.choice(PROMPTS) for _ in forms]
    params = [
        SamplingParams(temperature=1.0, max_tokens=400, seed=seed, structured_outputs=form.params)
        for seed, form in enumerate(forms)
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    answers = [output.outputs[0] for output in outputs]
    faults = [form.fault(one.text) for form, one in zip(forms, answers, strict=True)]
    assert not any(faults), [fault for fault in faults if fault][:5]
    assert {answer.finish_reason for answer in answers} == {"stop"}


def test_every_answer_is_valid(llm: LLM) -> None:
    check_random_forms(llm, 30)


@pytest.mark.long
def test_every_one_of_500_answers_is_valid(llm: LLM) -> None:
    check_random_forms(llm, 500)


def test_free_rows_are_as_they_are_without_constrained_neighbours(llm: LLM) -> None:
    def free(seed: int) -> SamplingParams:
        return SamplingParams(temperature=1.0, max_tokens=12, seed=seed)

    alone = llm.generate([*PROMPTS], [*map(free, range(len(PROMPTS)))], use_tqdm=False)
    bound = SamplingParams(
        temperature=1.0,
        max_tokens=40,
        seed=1,
        n=2,
        structured_outputs=StructuredOutputsParams(regex="[a-z]{3,9}!"),
    )
    mixed_prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    mixed_params = [one for seed in range(len(PROMPTS)) for one in (free(seed), bound)]
    together = llm.generate(mixed_prompts, mixed_params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in together[::2]] == [
        o.outputs[0].token_ids for o in alone
    ]
    assert all(one.text[-1] == "!" for o in together[1::2] for one in o.outputs)


def test_other_parameters_keep_their_meaning(llm: LLM) -> None:
    form = StructuredOutputsParams(regex="[ab]{2,40}")
    a, b = (llm.get_tokenizer().encode(text)[0] for text in "ab")
    cases = {
        "cut": SamplingParams(max_tokens=3, structured_outputs=form, logit_bias={a: 60.0}),
        "stop": SamplingParams(max_tokens=60, structured_outputs=form, stop="ba", seed=3),
        "biased": SamplingParams(
            max_tokens=60, min_tokens=30, structured_outputs=form, allowed_token_ids=[a, 2]
        ),
        "stop id": SamplingParams(max_tokens=60, structured_outputs=form, stop_token_ids=[b]),
    }
    outputs = llm.generate(["x"] * len(cases), [*cases.values()], use_tqdm=False)
    cut, stop, biased, stop_id = (output.outputs[0] for output in outputs)
    assert (cut.text, cut.finish_reason) == ("aaa", "length")
    assert stop.finish_reason == "stop" and "ba" not in stop.text
    assert set(biased.text) == {"a"} and len(biased.text) >= 30
    assert stop_id.finish_reason == "stop"


def test_a_bad_grammar_fails_its_client_alone(llm: LLM) -> None:
    with pytest.raises(ClientError, match="Invalid type: foo"):
        llm.generate("x", structured({"type": "foo"}), use_tqdm=False)
    (output,) = llm.generate("x", structured({"type": "boolean"}), use_tqdm=False)
    assert json.loads(output.outputs[0].text) in (True, False)


def test_a_hostile_schema_delays_nobody(llm: LLM) -> None:
    errors: list[str] = []

    def attack() -> None:
        try:
            llm.generate("x", structured(HOSTILE), use_tqdm=False)
        except ClientError as error:
            errors.append(str(error))

    attacker = threading.Thread(target=attack)
    attacker.start()
    (output,) = llm.generate("x", structured({"type": "boolean"}), use_tqdm=False)
    attacker.join(60)
    assert json.loads(output.outputs[0].text) in (True, False)
    assert "more than 2 s to compile" in errors[0]


def structured(schema: dict) -> SamplingParams:
    return SamplingParams(
        max_tokens=20,
        structured_outputs=StructuredOutputsParams(json=schema, disable_any_whitespace=True),
    )
