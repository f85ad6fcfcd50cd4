"""LLM over a fake engine: what is checked, what is sent, and what comes back in which order."""

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraplex import LLM, LoRARequest, SamplingParams
from loraplex.engine.errors import ClientError, EngineDeadError, UnknownAdapterError
from loraplex.entrypoints.offline import llm as llm_module

from helpers.fakes.fake_client import FakeClient, FakeEngine
from helpers.models.hf_models import make_tokenizer

TURN = {"role": "user", "content": "hi"}


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    monkeypatch.setattr(llm_module, "LocalEngine", FakeEngine)
    with LLM(max_num_seqs=8) as made:
        yield made


def client_of(llm: LLM) -> FakeClient:
    client: Any = llm.client
    return client


def texts(llm: LLM, *args: Any, **options: Any) -> list[str]:
    return [o.outputs[0].text for o in llm.generate(*args, use_tqdm=False, **options)]


def test_results_come_in_input_order(llm: LLM) -> None:
    prompts = [f"p{i}" for i in range(300)]
    assert texts(llm, prompts) == [f"base:{p}" for p in prompts]


def test_one_prompt_gives_a_list_of_one(llm: LLM) -> None:
    assert texts(llm, "hi") == ["base:hi"]
    assert texts(llm, {"prompt": "hi"}) == ["base:hi"]
    assert texts(llm, []) == []


def test_token_ids_and_numpy_integers(llm: LLM) -> None:
    ids = np.array([5, 6])
    assert texts(llm, {"prompt_token_ids": ids}) == ["base:[5, 6]"]
    assert texts(llm, [{"prompt_token_ids": [5]}, {"prompt": "t", "prompt_token_ids": [6]}]) == [
        "base:[5]",
        "base:[6]",
    ]


def test_lists_of_ids_are_prompts(llm: LLM) -> None:
    assert texts(llm, [5, 6]) == ["base:[5, 6]"]
    assert texts(llm, [[5], [6, 7], "hi"]) == ["base:[5]", "base:[6, 7]", "base:hi"]


@pytest.mark.parametrize(
    ("name", "mend"),
    [("embed", "only text"), ("score", "only text")],
)
def test_what_vllm_has_alone_is_refused_with_the_mend(llm: LLM, name: str, mend: str) -> None:
    with pytest.raises(AttributeError, match=mend):
        getattr(llm, name)
    assert not hasattr(llm, "no_such_name")


def test_default_sampling_params_are_the_models_as_in_vllm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(llm_module, "LocalEngine", FakeEngine)
    (tmp_path / "generation_config.json").write_text(
        '{"temperature": 0.6, "top_p": 0.9, "top_k": 20, "do_sample": true, "eos_token_id": 2,'
        ' "repetition_penalty": null}'
    )
    with LLM(str(tmp_path)) as llm:
        want = SamplingParams(temperature=0.6, top_p=0.9, top_k=20, max_tokens=16)
        assert llm.get_default_sampling_params() == want
        assert params_of(llm, None) == want
        assert params_of(llm, SamplingParams()) == SamplingParams(temperature=1.0)
    (tmp_path / "generation_config.json").unlink()
    with LLM(str(tmp_path)) as llm:
        assert params_of(llm, None) == SamplingParams(temperature=1.0, max_tokens=16)


def params_of(llm: LLM, given: SamplingParams | None) -> SamplingParams:
    """Returns the parameters with which a prompt is sent."""
    seen: list[SamplingParams] = []
    client = client_of(llm)
    submit = client.submit

    def spy(prompt: Any, params: SamplingParams, **options: Any) -> str:
        seen.append(params)
        return submit(prompt, params, **options)

    client.submit = spy  # type: ignore[method-assign, assignment]
    texts(llm, "hi", given)
    return seen.pop()


def test_params_adapters_and_priorities_pair_up(llm: LLM) -> None:
    params = [SamplingParams(n=i + 1) for i in range(3)]
    adapters = [LoRARequest("a"), None, LoRARequest("b")]
    outputs = llm.generate(
        ["x", {"prompt": "y", "cache_salt": "s"}, "z"],
        params,
        lora_request=adapters,
        priority=[3, 1, 2],
        use_tqdm=False,
    )
    assert [len(o.outputs) for o in outputs] == [1, 2, 3]
    assert [o.outputs[0].text for o in outputs] == ["a:x", "base:y", "b:z"]
    assert [o.lora_request for o in outputs] == adapters
    assert client_of(llm).salts == ["", "s", ""]
    assert client_of(llm).priorities == [3, 1, 2]


def test_one_adapter_for_all(llm: LLM) -> None:
    assert texts(llm, ["x", "y"], lora_request=LoRARequest("a")) == ["a:x", "a:y"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling_params": [SamplingParams()]}, "2 prompts but 1 entries in sampling_params"),
        ({"lora_request": [None] * 3}, "2 prompts but 3 entries in lora_request"),
        ({"priority": [1]}, "2 prompts but 1 entries in priority"),
    ],
)
def test_length_mismatch_submits_nothing(llm: LLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate(["x", "y"], use_tqdm=False, **options)
    assert client_of(llm).submitted == []


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        (["x", 5], TypeError, r"prompts\[1\] must be text"),
        ([{"text": "x"}], ValueError, r"unknown keys \['text'\]"),
        ([{}], TypeError, 'needs "prompt"'),
        ([{"prompt_token_ids": []}], ValueError, "is empty"),
        ([{"prompt_token_ids": ["a"]}], TypeError, "must be integers"),
        ([{"prompt_token_ids": "abc"}], TypeError, "list of integers"),
        (7, TypeError, "prompts must be"),
        ([{"prompt": "x", "cache_salt": 3}], TypeError, "cache_salt"),
    ],
)
def test_bad_prompts_submit_nothing(
    llm: LLM, prompts: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        llm.generate(prompts, use_tqdm=False)
    assert client_of(llm).submitted == []


@pytest.mark.parametrize("bad", ["a", [LoRARequest("a"), "b"], 5])
def test_bad_adapters_submit_nothing(llm: LLM, bad: Any) -> None:
    with pytest.raises(TypeError, match="lora_request"):
        llm.generate(["x", "y"], lora_request=bad, use_tqdm=False)
    assert client_of(llm).submitted == []


def test_chat_takes_one_conversation_or_many(llm: LLM) -> None:
    turn = {"role": "user", "content": "hi"}
    one = llm.chat([turn], use_tqdm=False)
    many = llm.chat([[turn], [turn, turn]], use_tqdm=False, lora_request=[None, LoRARequest("a")])
    assert [len(one), len(many)] == [1, 2]
    assert many[1].outputs[0].text.startswith("a:")
    assert llm.chat([], use_tqdm=False) == []


@pytest.mark.parametrize(
    ("messages", "error"),
    [("hi", TypeError), ([["hi"]], TypeError), ([[]], ValueError), ([{"content": "x"}], TypeError)],
)
def test_bad_conversations_submit_nothing(llm: LLM, messages: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="messages"):
        llm.chat(messages, use_tqdm=False)
    assert client_of(llm).submitted == []


def test_continue_final_message_excludes_a_new_header(llm: LLM) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hel"}]
    with pytest.raises(ValueError, match="add_generation_prompt=False"):
        llm.chat(turns, continue_final_message=True, use_tqdm=False)
    assert llm.chat(turns, continue_final_message=True, add_generation_prompt=False, use_tqdm=False)


def test_chat_passes_the_templates_options_on(llm: LLM) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    llm.chat([TURN], tools=tools, chat_template_kwargs={"mood": 1}, use_tqdm=False)
    (prompt,) = client_of(llm).prompts
    assert (prompt["tools"], prompt["chat_template_kwargs"]) == (tools, {"mood": 1})
    assert "documents" not in prompt


def test_a_chat_template_of_the_call_or_of_the_engine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(llm_module, "LocalEngine", FakeEngine)
    make_tokenizer(tmp_path)
    with LLM(str(tmp_path), chat_template="{{ 'engine' }}{{ mood }}") as llm:
        tokenizer = llm.engine_tokenizer
        assert tokenizer.apply_chat_template([TURN], mood="!") == "engine!"
        options = {"chat_template": "{{ mood }}{{ tools | length }}", "tools": [{}]}
        llm.chat([TURN], chat_template_kwargs={"mood": "ok"}, use_tqdm=False, **options)
        (prompt,) = client_of(llm).prompts
        assert prompt == {"prompt_token_ids": tokenizer.encode("ok1", add_special_tokens=False)}


def test_window_bounds_what_is_outstanding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_module, "LocalEngine", FakeEngine)
    with LLM(max_num_seqs=8, max_queue_len=10) as llm:
        params = [SamplingParams(n=1 + i % 4) for i in range(500)]
        outputs = llm.generate([f"p{i}" for i in range(500)], params, use_tqdm=False)
        assert [len(o.outputs) for o in outputs] == [p.n for p in params]
        assert 7 <= client_of(llm).max_sequences <= 10


def test_a_request_larger_than_the_window_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_module, "LocalEngine", FakeEngine)
    with LLM(max_num_seqs=8, max_queue_len=10) as llm:
        outputs = llm.generate(["a", "b", "c"], SamplingParams(n=50), use_tqdm=False)
        assert [len(o.outputs) for o in outputs] == [50, 50, 50]
        assert client_of(llm).max_sequences == 50


def test_failure_names_the_prompt_and_cancels_the_others(llm: LLM) -> None:
    client = client_of(llm)
    client.failures["p7"] = UnknownAdapterError("no adapter 'q'; there are ['a']")
    with pytest.raises(UnknownAdapterError, match="prompt 7: no adapter 'q'"):
        llm.generate([f"p{i}" for i in range(40)], use_tqdm=False)
    assert client.num_outstanding == 0
    assert texts(llm, ["after"]) == ["base:after"]


def test_failure_keeps_its_code(llm: LLM) -> None:
    error = ClientError("too long")
    error.code = "prompt_too_long"
    client_of(llm).failures["bad"] = error
    with pytest.raises(ClientError) as caught:
        llm.generate(["ok", "bad"], use_tqdm=False)
    assert caught.value.code == "prompt_too_long"


def test_interrupt_cancels_and_leaves_the_engine_usable(llm: LLM) -> None:
    client = client_of(llm)
    client.interrupt_at = 2
    with pytest.raises(KeyboardInterrupt):
        llm.generate([f"p{i}" for i in range(30)], use_tqdm=False)
    assert client.cancelled
    assert client.num_outstanding == 0
    assert texts(llm, ["x", "y"]) == ["base:x", "base:y"]


def test_dead_engine_gives_its_reason(llm: LLM) -> None:
    client_of(llm).dies_at = 2
    FakeEngine.last.dead_reason = "worker 0 was killed by signal 9"
    with pytest.raises(EngineDeadError, match="worker 0 was killed by signal 9"):
        llm.generate([f"p{i}" for i in range(30)], use_tqdm=False)
    FakeEngine.last.death_is_known = True
    num_submitted = len(client_of(llm).submitted)
    with pytest.raises(EngineDeadError, match="signal 9"):
        texts(llm, ["x"])
    assert len(client_of(llm).submitted) == num_submitted


def test_every_request_brings_the_path_of_its_adapter(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine decides what a path means, and may run in another folder."""
    monkeypatch.chdir(tmp_path)
    absolute = LoRARequest("a", 1, str(tmp_path / "sub/adapter"), load_inplace=True)
    for path in (absolute.lora_path, "sub/adapter"):
        request = LoRARequest("a", 1, path, load_inplace=True)
        texts(llm, ["x", "y"], lora_request=request)
    assert client_of(llm).adapters == [absolute] * 4


def test_two_paths_for_one_name_are_refused(llm: LLM) -> None:
    requests = [LoRARequest("a", 1, "/one"), LoRARequest("a", 2, "/two")]
    with pytest.raises(ValueError, match="two paths"):
        llm.generate(["x", "y"], lora_request=requests)
    assert client_of(llm).submitted == []


def test_bar_counts_requests_and_tokens(llm: LLM) -> None:
    class Bar:
        def __init__(self, **options: Any) -> None:
            self.total, self.n, self.postfix, self.closed = options["total"], 0, "", False
            made.append(self)

        def update(self, n: int) -> None:
            self.n += n

        def close(self) -> None:
            self.closed = True

    made: list[Bar] = []
    llm.generate(["x"] * 20, use_tqdm=Bar)
    (bar,) = made
    assert (bar.total, bar.n, bar.closed) == (20, 20, True)
    assert "output:" in bar.postfix
    assert "toks/s" in bar.postfix


def test_calls_from_threads_do_not_mix(llm: LLM) -> None:
    results: dict[int, list[str]] = {}

    def call(number: int) -> None:
        results[number] = texts(llm, [f"{number}-{i}" for i in range(20)])

    threads = [threading.Thread(target=call, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert results == {n: [f"base:{n}-{i}" for i in range(20)] for n in range(6)}


def test_shutdown_is_idempotent_and_final(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_module, "LocalEngine", FakeEngine)
    llm = LLM()
    engine = FakeEngine.last
    llm.shutdown()
    llm.shutdown()
    assert engine.num_closed == 1
    with pytest.raises(EngineDeadError, match="shut down"):
        llm.generate("x")


def test_collecting_the_object_closes_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_module, "LocalEngine", FakeEngine)
    llm = LLM()
    engine = FakeEngine.last
    del llm
    gc.collect()
    assert engine.num_closed == 1
