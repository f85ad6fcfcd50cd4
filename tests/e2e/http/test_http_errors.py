"""Errors over HTTP have OpenAI's shape and the right status, and bodies are bounded."""

import json
import socket
from typing import Any

import httpx
import openai
import pytest

from helpers.running.http_server import BASE, Served

pytestmark = pytest.mark.e2e
CHAT = {"messages": [{"role": "user", "content": "x"}]}


@pytest.fixture
def http(served: Served) -> httpx.Client:
    return httpx.Client(base_url=served.url, timeout=60)


BAD: list[tuple[dict[str, Any], int, str, str]] = [
    ({"prompt": "x", "max_tokens": 0}, 400, "BadRequestError", "max_tokens must be at least 1"),
    ({"prompt": "x", "temperature": -1}, 400, "BadRequestError", "temperature must lie in"),
    ({"prompt": "x", "temperature": "hot"}, 400, "BadRequestError", "temperature: "),
    ({"prompt": "x", "n": 1000}, 400, "BadRequestError", "n must lie in [1, 256]"),
    ({"prompt": "x", "logprobs": 1000}, 400, "BadRequestError", "logprobs must lie in"),
    ({"prompt": "x", "logit_bias": {"9999999": 1}}, 400, "BadRequestError", "vocabulary"),
    ({"prompt": "x", "suffix": "y"}, 400, "BadRequestError", "suffix is not supported"),
    ({"prompt": "x", "best_of": 4}, 400, "BadRequestError", "best_of is not supported"),
    ({"prompt": "x", "response_format": {"type": "xml"}}, 400, "BadRequestError", "type must be"),
    ({"prompt": "x", "structured_outputs": {}}, 400, "BadRequestError", "exactly one of"),
    ({"prompt": "x", "structured_outputs": {"regex": "(a"}}, 400, "BadRequestError", "unclosed"),
    ({"prompt": "x", "guided_json": {"a": 1}}, 400, "BadRequestError", "use structured_outputs"),
    ({"prompt": "x", "stream_options": {"include_usage": True}}, 400, "BadRequestError", "stream"),
    ({"prompt": "x " * 600}, 400, "BadRequestError", "max_model_len is 512"),
    ({"prompt": "x" * 20_000}, 400, "BadRequestError", "20000 characters"),  # in another thread
    ({"prompt": "x", "priority": 2**40}, 400, "BadRequestError", "must fit 32 bits"),
    ({"prompt": [1, "x"]}, 400, "BadRequestError", "prompt must be a text"),
    ({"prompt": [[1], [-5]]}, 400, "BadRequestError", "outside the vocabulary"),
    ({"prompt": []}, 400, "BadRequestError", "prompt must have"),
    ({}, 400, "BadRequestError", "prompt must have"),
    ({"prompt": "x", "model": "a", "lora_path": "b"}, 400, "BadRequestError", "leave one out"),
    ({"prompt": "x", "lora_path": "no name!"}, 404, "NotFoundError", "does not exist"),
    ({"prompt": "x", "model": "nobody"}, 404, "NotFoundError", "`nobody` does not exist"),
    ({"prompt": "x", "model": f"{BASE}:nobody"}, 404, "NotFoundError", "does not exist"),
    ({"prompt": "x", "model": "no name!"}, 404, "NotFoundError", "`no name!` does not exist"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "kind", "text"), BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_names_its_fault(
    body: dict[str, Any], status: int, kind: str, text: str, stream: bool, http: httpx.Client
) -> None:
    if stream and "stream_options" in body:
        return
    response = http.post("/v1/completions", json={**body, "stream": stream})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"]) == (status, status, kind)
    assert text in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_the_clients_exceptions_fit(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        api.chat.completions.create(model="nobody", **CHAT)  # type: ignore[call-overload]
    assert caught.value.param == "model" and caught.value.type == "NotFoundError"
    with pytest.raises(openai.BadRequestError, match="top_logprobs needs logprobs"):
        api.chat.completions.create(model=BASE, top_logprobs=2, **CHAT)  # type: ignore[call-overload]
    with pytest.raises(openai.BadRequestError, match="messages"):
        api.chat.completions.create(model=BASE, messages=[])


def test_unknown_fields_are_ignored_and_neutral_values_pass(http: httpx.Client) -> None:
    body = {"prompt": "x", "max_tokens": 2, "unheard_of": 1, "user": "u", "suffix": None,
            "response_format": {"type": "text"}, "best_of": 1, "metadata": {"a": "b"}}  # fmt: skip
    assert http.post("/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[1]", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b'{"prompt": "\\ud800"}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"prompt": "x"}', "text/plain", 415),
        (b'{"prompt": "x"}', "application/x-www-form-urlencoded", 415),
        (json.dumps({"prompt": [0] * 300_000}).encode(), "application/json", 413),
        (b'{"prompt": "x", "y": ' + b"[[],[]," * 200_000, "application/json", 413),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bodies_that_are_no_requests(
    content: bytes, kind: str, status: int, http: httpx.Client
) -> None:
    response = http.post("/v1/completions", content=content, headers={"content-type": kind})
    assert response.status_code == status == response.json()["error"]["code"]


def test_a_text_full_of_commas_is_no_list(http: httpx.Client) -> None:
    body = {"prompt": "x", "max_tokens": 1, "ignored": '",[{\\' * 150_000}
    assert http.post("/v1/completions", json=body).status_code == 200


def test_a_body_of_100_mb_is_refused_unread(served: Served, http: httpx.Client) -> None:
    host, port = served.engine.http_endpoint.rsplit(":", 1)
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {100 << 20}\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head.encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")

    def parts() -> Any:
        yield b'{"prompt": "'
        for _ in range(100):
            yield b"x" * (1 << 20)

    try:
        response = http.post(
            "/v1/completions", content=parts(), headers={"content-type": "application/json"}
        )
    except httpx.TransportError:
        return  # the server may close while the client still writes
    assert response.status_code == 413


def test_unknown_paths_and_methods(http: httpx.Client) -> None:
    missing = http.get("/v1/nothing")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == 404
    wrong = http.get("/v1/completions")
    assert wrong.status_code == 405 and wrong.json()["error"]["code"] == 405


def test_health_ready_and_version(http: httpx.Client) -> None:
    health = http.get("/health")
    assert health.status_code == 200 and health.json()["status"] == "ok"
    assert http.get("/ready").status_code == 200
    assert http.get("/version").json()["version"]


@pytest.mark.parametrize("add_special_tokens", [False, True])
def test_a_text_that_no_prompt_can_hold_is_not_tokenized(
    http: httpx.Client, add_special_tokens: bool
) -> None:
    body = {"prompt": "x y " * 50_000, "add_special_tokens": add_special_tokens}
    response = http.post("/tokenize", json=body)
    assert response.status_code == 400
    assert "200000 characters" in response.json()["error"]["message"]


@pytest.mark.parametrize("token", [-1, 2**70])
def test_ids_outside_the_vocabulary_have_no_text(http: httpx.Client, token: int) -> None:
    response = http.post("/detokenize", json={"tokens": [5, token]})
    assert response.status_code == 400
    assert "outside the vocabulary" in response.json()["error"]["message"]


def test_a_body_of_wrong_entries_alone_is_not_described_entry_by_entry(http: httpx.Client) -> None:
    response = http.post("/v1/chat/completions", json={"messages": [1] * 100_000})
    assert response.status_code == 400
    assert "100,000 values of wrong types" in response.json()["error"]["message"]
