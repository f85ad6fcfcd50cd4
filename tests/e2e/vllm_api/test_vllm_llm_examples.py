"""The tasks of vLLM's offline examples: generate, chat, prefix caching, metrics.

The scripts parse vLLM's flags, make an LLM of the whole namespace and print what comes back.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraplex import LLM, EngineArgs, RequestOutput, SamplingParams
from loraplex.distributed import cleanup_dist_env_and_memory
from loraplex.lora.request import LoRARequest
from loraplex.sampling_params import BeamSearchParams
from loraplex.utils import FlexibleArgumentParser
from loraplex.v1.metrics.reader import Counter, Gauge, Histogram

pytestmark = pytest.mark.e2e

PROMPTS = ["Hello, my name is", "The capital of France is", "Numbers: 0 1 2", "The future is"]
PREFIX = "A page holds sixteen tokens; an adapter of rank 8 is small but not free. " * 4
CONVERSATION = [
    {"role": "system", "content": "You are a helpful assistant"},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello! How can I assist you today?"},
    {"role": "user", "content": "Write an essay about higher education."},
]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}|{% endfor %}"


def parse(words: list[str]) -> dict[str, Any]:
    """Does what the scripts do before they make an LLM: flags of the engine and of sampling."""
    parser = FlexibleArgumentParser()
    group = parser.add_argument_group("Engine arguments")
    EngineArgs.add_cli_args(group)
    group.set_defaults(model="meta-llama/Llama-3.2-1B-Instruct")
    sampling = parser.add_argument_group("Sampling parameters")
    sampling.add_argument("--max-tokens", type=int)
    sampling.add_argument("--temperature", type=float)
    sampling.add_argument("--top-p", type=float)
    sampling.add_argument("--top-k", type=int)
    parser.add_argument("--chat-template-path", type=str)
    return vars(parser.parse_args(words))


def sampling_of(llm: LLM, args: dict[str, Any]) -> SamplingParams:
    params = llm.get_default_sampling_params()
    for name in ("max_tokens", "temperature", "top_p", "top_k"):
        if args[name] is not None:
            setattr(params, name, args[name])
    return params


@pytest.fixture(scope="module")
def args(flags: list[str]) -> dict[str, Any]:
    return parse([*flags, "--max_tokens", "12", "--temperature", "0"])


def engine_keywords(args: dict[str, Any]) -> dict[str, Any]:
    popped = ("max_tokens", "temperature", "top_p", "top_k", "chat_template_path")
    return {name: value for name, value in args.items() if name not in popped}


@pytest.fixture(scope="module")
def llm(args: dict[str, Any]) -> Iterator[LLM]:
    with LLM(**engine_keywords(args)) as made:
        yield made


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def test_generate(llm: LLM, args: dict[str, Any]) -> None:
    params = sampling_of(llm, args)
    assert (params.max_tokens, params.temperature) == (12, 0.0)
    outputs = llm.generate(PROMPTS, params)
    assert [output.prompt for output in outputs] == PROMPTS
    assert all(len(output.outputs[0].token_ids) <= 12 for output in outputs)
    for output in outputs:
        print(f"Prompt: {output.prompt!r}, Generated text: {output.outputs[0].text!r}")


def test_chat(llm: LLM, args: dict[str, Any], tmp_path: Path) -> None:
    params = sampling_of(llm, args)
    (one,) = llm.chat(CONVERSATION, params, False)
    many = llm.chat([CONVERSATION for _ in range(10)], params, use_tqdm=True)
    assert texts(many) == [one.outputs[0].text] * 10
    assert one.prompt is not None
    assert one.prompt.endswith("higher education.<|im_end|>\n<|im_start|>assistant\n")
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    chat_template = (tmp_path / "template.jinja").read_text()
    outputs = llm.chat([CONVERSATION] * 2, params, use_tqdm=False, chat_template=chat_template)
    want = "".join(f"{message['content']}|" for message in CONVERSATION)
    assert [output.prompt for output in outputs] == [want] * 2


def test_automatic_prefix_caching(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=8)
    assert llm.reset_prefix_cache()
    (first,) = llm.generate(PREFIX + "How old is John?", sampling_params=params)
    (second,) = llm.generate(PREFIX + "How old is Zack?", sampling_params=params)
    assert first.num_cached_tokens == 0
    num_shared = len(llm.get_tokenizer().encode(PREFIX)) - 1
    assert second.num_cached_tokens is not None
    assert num_shared - 16 <= second.num_cached_tokens <= num_shared
    assert llm.reset_prefix_cache()
    (again,) = llm.generate(PREFIX + "How old is Zack?", sampling_params=params)
    assert (again.num_cached_tokens, texts([again])) == (0, texts([second]))


def test_an_engine_with_a_prefix_cache_answers_as_one_without(
    llm: LLM, args: dict[str, Any]
) -> None:
    params = SamplingParams(temperature=0.0)
    prompts = [PREFIX + prompt for prompt in PROMPTS]
    regular_llm = LLM(**engine_keywords(args) | {"enable_prefix_caching": False})
    regular = regular_llm.generate(prompts, params)
    assert {output.num_cached_tokens for output in regular} == {0}
    del regular_llm
    cleanup_dist_env_and_memory()
    llm.generate(prompts[0], params)
    cached = llm.generate(prompts, params)
    assert texts(cached) == texts(regular)
    assert all(output.num_cached_tokens for output in cached)


def test_metrics(llm: LLM) -> None:
    def value(name: str) -> float:
        return sum(
            metric.value
            for metric in llm.get_metrics()
            if isinstance(metric, Counter | Gauge) and metric.name == f"vllm:{name}"
        )

    before = value("generation_tokens"), value("request_success")
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    outputs = llm.generate(PROMPTS, params)
    assert value("generation_tokens") == before[0] + 20
    assert value("request_success") == before[1] + 4
    assert value("num_requests_running") == 0
    (lengths,) = [m for m in llm.get_metrics() if m.name == "vllm:request_generation_tokens"]
    assert isinstance(lengths, Histogram)
    assert lengths.buckets["+Inf"] == lengths.count
    for output in outputs:
        times = output.metrics
        assert times is not None
        assert times.num_generation_tokens == 5
        assert times.arrival_time <= times.scheduled_ts <= times.first_token_ts
        assert times.first_token_ts < times.last_token_ts
        assert times.first_token_latency == pytest.approx(
            times.first_token_ts - times.arrival_time, abs=1e-3
        )


def test_bad_words(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    (free,) = llm.generate("The capital", params, use_tqdm=False)
    tokenizer = llm.get_tokenizer()
    words = [w for i in free.outputs[0].token_ids[2:6] if (w := tokenizer.decode([i]).strip())]
    params.bad_words = words
    (kept,) = llm.generate("The capital", params, use_tqdm=False)
    assert kept.outputs[0].text != free.outputs[0].text
    spelled = [tokenizer.encode(word, add_special_tokens=False) for word in words]
    single = {ids[0] for ids in spelled if len(ids) == 1}
    assert single
    assert single.isdisjoint(kept.outputs[0].token_ids)


def test_beam_search_with_an_adapter(llm: LLM, models: Path) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=4)
    adapter = LoRARequest("a", 1, str(models / "a"))
    base, adapted = llm.beam_search(["Hello"] * 2, params, lora_request=[None, adapter])
    assert len(base.sequences) == len(adapted.sequences) == 3
    assert adapted.sequences[0].lora_request is not None
    assert base.sequences[0].cum_logprob != adapted.sequences[0].cum_logprob
