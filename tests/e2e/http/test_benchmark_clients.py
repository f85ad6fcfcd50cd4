"""Streams asked for with the bodies of the benchmark clients of vLLM and SGLang.

The bodies and the way in which events are read are those of `vllm bench serve` (backends openai and
openai-chat) and of `sglang.bench_serving` (backends sglang-oai and sglang-oai-chat).
"""

import json
from typing import Any

import httpx
import pytest

from loraplex import SamplingParams

from helpers.running.http_server import BASE, Served

pytestmark = pytest.mark.e2e
PROMPT = "Numbers: 0 1 2"
CHAT = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
NUM_TOKENS = 12
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
VLLM_TEXT: dict[str, Any] = {
    "prompt": PROMPT, "repetition_penalty": 1.0, "max_tokens": NUM_TOKENS, "logprobs": None,
    "ignore_eos": True, "temperature": 0.0, **USAGE,
}  # fmt: skip
VLLM_CHAT: dict[str, Any] = {
    "messages": CHAT, "max_completion_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0.0,
    **USAGE,
}  # fmt: skip
SGLANG_TEXT: dict[str, Any] = {
    "prompt": PROMPT, "temperature": 0.0, "best_of": 1, "max_tokens": NUM_TOKENS, "stream": True,
    "ignore_eos": True,
}  # fmt: skip
SGLANG_CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": PROMPT}], "temperature": 0.0,
    "max_completion_tokens": NUM_TOKENS, "stream": True, "ignore_eos": True,
}  # fmt: skip


def stream(served: Served, path: str, body: dict[str, Any]) -> tuple[str, int, dict[str, Any]]:
    """Returns the text, the number of events with choices, and the usage."""
    text, num_events, usage = "", 0, {}
    headers = {"Authorization": "Bearer none", "x-request-id": "bench-0"}
    url = f"{served.url}/v1/{path}"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as response:
        assert response.status_code == 200
        for line in filter(None, response.iter_lines()):
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                continue
            event = json.loads(data)
            if event["choices"]:
                choice = event["choices"][0]
                text += (
                    choice["delta"].get("content") if "delta" in choice else choice["text"]
                ) or ""
                num_events += 1
            elif event.get("usage"):
                usage = event["usage"]
    return text, num_events, usage


@pytest.mark.parametrize("adapter", ["a", ""])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", VLLM_TEXT),
        ("chat/completions", VLLM_CHAT),
        ("completions", SGLANG_TEXT),
        ("chat/completions", SGLANG_CHAT),
    ],
    ids=["vllm", "vllm-chat", "sglang", "sglang-chat"],
)
def test_streams_of_benchmark_clients(
    path: str, body: dict[str, Any], adapter: str, served: Served
) -> None:
    is_sglang = "stream_options" not in body
    named = {"model": adapter or BASE, **({"lora_path": adapter} if adapter and is_sglang else {})}
    text, num_events, usage = stream(served, path, {**body, **named})
    prompt: Any = PROMPT if path == "completions" else {"messages": CHAT}
    with served.zmq() as client:
        params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        *_, want = client.generate(prompt, params, adapter=adapter or None)
    assert text == want.outputs[0].text
    assert num_events > 1, "time between tokens is measured between events"
    if not is_sglang:
        assert usage["completion_tokens"] == NUM_TOKENS
        assert usage["prompt_tokens"] == len(want.prompt_token_ids or ())


def test_the_adapter_of_sglangs_clients_is_never_the_base_model(served: Served) -> None:
    texts = [
        stream(served, "completions", {**SGLANG_TEXT, **named})[0]
        for named in ({"model": "b"}, {"model": BASE, "lora_path": "b"}, {"lora_path": "b"})
    ]
    base, _, _ = stream(served, "completions", {**SGLANG_TEXT, "model": BASE})
    assert len(set(texts)) == 1 and base not in texts
    unknown = {**SGLANG_TEXT, "model": BASE, "lora_path": "nobody"}
    assert httpx.post(f"{served.url}/v1/completions", json=unknown).status_code == 404


def test_the_first_model_is_the_base_model(served: Served) -> None:
    """Clients that get no --model take the first one, and its root as the tokenizer."""
    first = httpx.get(f"{served.url}/v1/models").json()["data"][0]
    assert (first["id"], first["root"]) == (BASE, str(served.root / "base"))
