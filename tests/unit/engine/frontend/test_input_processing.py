from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loraplex.engine.config import EngineConfig, ModelConfig
from loraplex.engine.errors import ClientError, ConfigError
from loraplex.engine.frontend import protocol
from loraplex.engine.frontend.inputs import InputProcessor, TextCodec, load_text_codec
from loraplex.engine.frontend.protocol import GenerateRequest
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.engine.ipc.messages.frontend import EngineInfo
from loraplex.engine.tokenizer.chat_template import ChatTemplate
from loraplex.scheduler.worker_protocol import WorkerReady

from helpers.models.hf_models import make_tokenizer

INFO = EngineInfo(
    max_model_len=32,
    vocab_size=384,
    num_pages=10,
    block_tokens=16,
    max_queue_len=10,
    workers=[
        WorkerReady(0, 10, 64, 1, 32, 384, "cpu", "torch", "torch",
                    eos_token_ids=array("i", [4]))
    ],
)  # fmt: skip


CHAT = [{"role": "user", "content": "hi"}]


def processor(codec: TextCodec | None, *, seed: int = 0, name: str = "frontend 0") -> Any:
    return InputProcessor(EngineConfig(model=ModelConfig(seed=seed)), INFO, codec, name)


def ask(**values: Any) -> GenerateRequest:
    return GenerateRequest(request_id="a", **values)


def test_text_and_chats_become_the_tokenizers_ids(codec: TextCodec) -> None:
    inputs = processor(codec)
    tokenizer = codec.tokenizer
    assert inputs.tokenize(ask(prompt="hello")).tolist() == tokenizer.encode("hello")
    chat = ask(messages=[{"role": "user", "content": "hi"}])
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert inputs.tokenize(chat).tolist() == tokenizer.encode(text, add_special_tokens=False)
    begun = ask(
        messages=[{"role": "assistant", "content": "so"}],
        add_generation_prompt=False,
        continue_final_message=True,
    )
    text = "<|im_start|>assistant\nso"
    assert inputs.tokenize(begun).tolist() == tokenizer.encode(text, add_special_tokens=False)


def test_the_longest_prompt_leaves_room_for_one_token() -> None:
    inputs = processor(None)
    assert len(inputs.tokenize(ask(prompt_token_ids=array("i", [5] * 31)))) == 31
    with pytest.raises(ClientError, match="32 tokens; max_model_len is 32") as caught:
        inputs.tokenize(ask(prompt_token_ids=array("i", [5] * 32)))
    assert caught.value.code == "prompt_too_long"


@pytest.mark.parametrize("token_id", [-1, 384, 2**31 - 1])
def test_ids_outside_the_vocabulary_are_refused(token_id: int) -> None:
    with pytest.raises(ClientError, match=rf"token id {token_id} is outside"):
        processor(None).tokenize(ask(prompt_token_ids=array("i", [1, token_id, 2])))


def test_an_empty_prompt_is_refused(codec: TextCodec) -> None:
    with pytest.raises(ClientError, match="empty"):
        processor(codec).tokenize(ask(prompt_token_ids=array("i")))


def test_text_without_a_tokenizer_says_what_to_send() -> None:
    assert load_text_codec(ModelConfig(model="/nowhere", skip_tokenizer_init=True)) is None
    with pytest.raises(ClientError, match="skip_tokenizer_init.*prompt_token_ids"):
        processor(None).tokenize(ask(prompt="hello"))


def test_a_chat_without_a_template_says_what_to_do(codec: TextCodec) -> None:
    with pytest.raises(ClientError, match="no chat template"):
        processor(replace(codec, chat_template=None)).tokenize(
            ask(messages=[{"role": "user", "content": "hi"}])
        )


def test_tools_documents_and_variables_reach_the_template(codec: TextCodec) -> None:
    source = "{{ tools | tojson }} {{ documents | tojson }} {{ mood }}"
    inputs = processor(replace(codec, chat_template=ChatTemplate(source, {})))

    def render(**values: Any) -> str:
        message = {"type": "generate", "request_id": "a", "messages": CHAT, **values}
        return codec.tokenizer.decode(inputs.tokenize(protocol.parse(message)))

    assert render() == "null null "
    assert render(tools=None, chat_template_kwargs=None) == "null null "
    more = {"tools": [{"name": "f"}], "documents": [], "chat_template_kwargs": {"mood": "up"}}
    assert render(**more) == '[{"name": "f"}] [] up'
    for name in ("messages", "tokenize"):
        with pytest.raises(ClientError, match=f"chat_template_kwargs: must not set '{name}'"):
            render(chat_template_kwargs={name: 1})


def test_a_chat_that_the_template_refuses_is_the_clients_fault(codec: TextCodec) -> None:
    with pytest.raises(ClientError):
        processor(codec).tokenize(ask(messages=[{"role": "user", "content": [{"type": "image"}]}]))


def test_the_chat_template_can_be_replaced(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages[0]['content'] }}!")
    codec = load_text_codec(ModelConfig(model=str(tmp_path), chat_template=str(template)))
    assert codec is not None
    ids = processor(codec).tokenize(ask(messages=[{"role": "user", "content": "ab"}]))
    assert codec.tokenizer.decode(ids) == "ab!"
    with pytest.raises(ConfigError, match="chat_template /nowhere"):
        load_text_codec(ModelConfig(model=str(tmp_path), chat_template="/nowhere"))


def test_end_of_sequence_comes_from_model_and_tokenizer(codec: TextCodec) -> None:
    def stops(**values: Any) -> list[int]:
        (spec,) = processor(codec).sampling_specs(SamplingParams(**values), 4)
        return spec.stop_token_ids.tolist()

    (eos,) = codec.tokenizer.eos_token_ids
    assert stops() == sorted({eos, 4})
    assert stops(stop_token_ids=[9]) == sorted({eos, 4, 9})
    assert stops(ignore_eos=True) == []
    assert stops(ignore_eos=True, stop_token_ids=[9]) == [9]


def test_lengths_fit_the_context() -> None:
    inputs = processor(None)
    (spec,) = inputs.sampling_specs(SamplingParams(max_tokens=None), 30)
    assert (spec.max_tokens, spec.min_tokens) == (2, 0)
    (spec,) = inputs.sampling_specs(SamplingParams(max_tokens=9, min_tokens=5), 30)
    assert (spec.max_tokens, spec.min_tokens) == (2, 2)
    (spec,) = inputs.sampling_specs(SamplingParams(max_tokens=9), 3)
    assert spec.max_tokens == 9


def test_values_are_passed_on_and_switched_off_where_greedy() -> None:
    params = SamplingParams(
        temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.2,
        presence_penalty=0.3, frequency_penalty=0.4, logprobs=3, prompt_logprobs=0,
        logit_bias={7: -1.5, 9: 2.0},
    )  # fmt: skip
    (spec,) = processor(None).sampling_specs(params, 3)
    assert (spec.temperature, spec.top_p, spec.top_k, spec.min_p) == (0.7, 0.9, 5, 0.1)
    assert (spec.repetition_penalty, spec.presence_penalty, spec.frequency_penalty) == (
        1.2, 0.3, 0.4,
    )  # fmt: skip
    assert (spec.num_logprobs, spec.num_prompt_logprobs) == (3, 0)
    assert spec.bias_token_ids.tolist() == [7, 9]
    assert spec.bias_values == array("f", [-1.5, 2.0])
    greedy = replace(params, temperature=0.0)
    (spec,) = processor(None).sampling_specs(greedy, 3)
    assert (spec.temperature, spec.top_p, spec.top_k, spec.min_p) == (0.0, 1.0, 0, 0.0)
    assert spec.repetition_penalty == 1.2


@pytest.mark.parametrize("temperature", [1e-9, 1e-5, 0.009])
def test_a_tiny_temperature_counts_as_a_hundredth(temperature: float) -> None:
    (spec,) = processor(None).sampling_specs(SamplingParams(temperature=temperature, top_k=5), 3)
    assert (spec.temperature, spec.top_k) == (0.01, 5)


def test_an_ignored_end_is_still_forbidden_before_min_tokens(codec: TextCodec) -> None:
    def ignored(**values: Any) -> list[int]:
        (spec,) = processor(codec).sampling_specs(SamplingParams(min_tokens=2, **values), 4)
        return spec.ignored_eos_ids.tolist()

    (eos,) = codec.tokenizer.eos_token_ids
    assert ignored() == []
    assert ignored(ignore_eos=True) == sorted({eos, 4})
    assert ignored(ignore_eos=True, stop_token_ids=[4]) == [eos]


@pytest.mark.parametrize(("top_k", "expected"), [(-1, 0), (0, 0), (7, 7), (2**60, 384)])
def test_top_k_fits_the_vocabulary(top_k: int, expected: int) -> None:
    (spec,) = processor(None).sampling_specs(SamplingParams(top_k=top_k), 3)
    assert spec.top_k == expected


@pytest.mark.parametrize("token_id", [-1, 384])
def test_biased_and_stop_ids_outside_the_vocabulary_are_refused(token_id: int) -> None:
    with pytest.raises(ClientError, match="logit_bias: token id"):
        processor(None).sampling_specs(SamplingParams(logit_bias={token_id: 1.0}), 3)
    with pytest.raises(ClientError, match="stop_token_ids: token id"):
        processor(None).sampling_specs(SamplingParams(stop_token_ids=[token_id]), 3)


@pytest.mark.parametrize("bias", [float("nan"), float("inf"), 1e39, True, "1"])
def test_biases_that_are_no_finite_logits_are_refused(bias: Any) -> None:
    with pytest.raises(ValueError, match="logit_bias must map"):
        SamplingParams(logit_bias={5: bias})


def test_bias_of_minus_infinity_is_taken() -> None:
    (spec,) = processor(None).sampling_specs(SamplingParams(logit_bias={5: -float("inf")}), 3)
    assert spec.bias_values == array("f", [-float("inf")])


def test_seeds() -> None:
    def seeds(inputs: Any, **values: Any) -> list[int]:
        return [spec.seed for spec in inputs.sampling_specs(SamplingParams(**values), 3)]

    inputs, again, other = processor(None), processor(None), processor(None, seed=1)
    first = [seeds(inputs) for _ in range(50)]
    assert len({seed for (seed,) in first}) == 50  # requests without a seed differ,
    assert first == [seeds(again) for _ in range(50)]  # in the same way in every run,
    assert first[0] != seeds(other)  # and with the engine's seed
    assert first[0] != seeds(processor(None, name="frontend 1"))
    assert seeds(inputs, seed=7) == seeds(other, seed=7) == [7]
    four = seeds(inputs, seed=7, n=4)
    assert four[0] == 7
    assert len(set(four)) == 4
    assert four == seeds(other, seed=7, n=4)
    assert all(0 <= seed < 2**63 for seed in four)


def test_the_seed_minus_one_is_no_seed_and_other_negative_ones_are_refused() -> None:
    assert SamplingParams(seed=-1) == SamplingParams()
    assert SamplingParams.from_wire({"seed": -1}).seed is None
    inputs = processor(None)
    drawn = {inputs.sampling_specs(SamplingParams(seed=-1), 3)[0].seed for _ in range(20)}
    assert len(drawn) == 20
    for seed in (-2, -(2**63)):
        with pytest.raises(ValueError, match=f"seed must not be negative, got {seed}"):
            SamplingParams(seed=seed)


def test_logprobs_true_means_the_most_likely_token() -> None:
    params = SamplingParams(logprobs=True, prompt_logprobs=True)
    assert (params.logprobs, params.prompt_logprobs) == (1, 1)
    assert SamplingParams.from_wire({"logprobs": True}).logprobs == 1
    with pytest.raises(TypeError, match="logprobs"):
        SamplingParams(logprobs=False)


def test_only_the_first_of_n_judges_the_prompt() -> None:
    specs = processor(None).sampling_specs(SamplingParams(n=3, prompt_logprobs=2), 3)
    assert [spec.num_prompt_logprobs for spec in specs] == [2, -1, -1]


def test_a_long_text_is_refused_by_its_length(codec: TextCodec) -> None:
    with pytest.raises(ClientError, match="characters, more than max_model_len") as caught:
        processor(codec).tokenize(ask(prompt="lorem ipsum " * 20_000))
    assert caught.value.code == "prompt_too_long"
