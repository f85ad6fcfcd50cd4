"""Chats in a real browser, against the answers that the API gives."""

import json
from typing import Any

import openai
import pytest

from helpers.browser.browser_waits import wait_until
from helpers.running.http_server import BASE, Served

pytestmark = pytest.mark.e2e

QUESTION = "Where is the harbour?"
EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>'


def answer(served: Served, model: str, max_tokens: int) -> str:
    api = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    reply = api.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=max_tokens,
    )
    return reply.choices[0].message.content or ""


def set_options(page: Any, *, max_tokens: int, temperature: int = 0) -> None:
    page.click("#settings summary")
    page.fill("#temperature", str(temperature))
    page.fill("#max-tokens", str(max_tokens))
    page.click("#settings summary")


def ask(page: Any, text: str = QUESTION) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def texts(page: Any) -> list[str]:
    """Returns the texts of all answers, those on the left first."""
    return page.eval_on_selector_all(
        ".message:not(.user) .text", "found => found.map(e => e.textContent)"
    )


def test_an_answer_of_an_adapter_streams(served: Served, page: Any) -> None:
    page.goto(served.url)
    page.select_option(".column:first-child select", "a")
    set_options(page, max_tokens=100)
    ask(page)
    wait_until(page, "document.querySelector('.running .text')?.textContent.length > 3")
    page.wait_for_selector("#send:visible")
    assert texts(page) == [answer(served, "a", 100)]
    assert page.inner_text(".message:not(.user) .who") == "a"
    assert "100 tokens" in page.inner_text(".meta")
    assert page.evaluate("document.activeElement.id") == "prompt"


def test_two_models_answer_one_prompt_side_by_side(served: Served, page: Any) -> None:
    page.goto(served.url)
    page.click("#two")
    page.select_option(".column:first-child select", BASE)
    page.select_option(".column:last-child select", "b")
    set_options(page, max_tokens=30)
    ask(page)
    page.wait_for_selector("#send:visible")
    wait_until(page, "document.querySelectorAll('.message:not(.user):not(.running)').length == 2")
    assert texts(page) == [answer(served, BASE, 30), answer(served, "b", 30)]
    assert page.locator(".message.user .text").all_inner_texts() == [QUESTION, QUESTION]


def test_stop_ends_the_answer_on_the_server(served: Served, page: Any) -> None:
    page.goto(served.url)
    set_options(page, max_tokens=480, temperature=2)
    ask(page)
    wait_until(page, "document.querySelector('.running .text')?.textContent.length > 3")
    page.click("#stop")
    page.wait_for_selector("#send:visible")
    assert "stopped" in page.inner_text(".meta")
    with served.zmq() as client:
        while client.stats()["running"]:
            pass


def test_an_error_is_shown_in_the_servers_words(served: Served, page: Any) -> None:
    page.goto(served.url)
    set_options(page, max_tokens=5, temperature=-1)
    ask(page)
    page.wait_for_selector(".message.failed")
    assert "temperature" in page.inner_text(".message.failed .text")


def test_the_keyboard_is_enough(served: Served, page: Any) -> None:
    page.goto(f"{served.url}/#chat/b")
    wait_until(page, "document.querySelector('select').value == 'b'")
    wait_until(page, "document.activeElement.id == 'prompt'")
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")
    page.keyboard.press("Enter")
    page.wait_for_selector("#send:visible")
    assert page.inner_text(".message.user .text") == "Hello\nthere"


def test_names_and_texts_are_never_html(served: Served, page: Any) -> None:
    """The names of this engine's adapters are checked; another server's may be anything."""
    models = {"data": [{"id": EVIL}]}
    chunk = {"choices": [{"index": 0, "delta": {"content": EVIL}, "finish_reason": "stop"}]}
    page.route("**/v1/models", lambda route: route.fulfill(json=models))
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            body=f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n", content_type="text/event-stream"
        ),
    )
    page.goto(served.url)
    ask(page, EVIL)
    page.wait_for_selector("#send:visible")
    assert texts(page) == [EVIL]
    assert page.inner_text("#model") == EVIL
    assert page.locator("main script, main img").count() == 0


def test_a_key_is_asked_for_and_sent(served: Served, page: Any) -> None:
    """The answers are those of a server with API keys."""
    seen: list[str] = []

    def answer_models(route: Any) -> None:
        seen.append(route.request.headers.get("authorization", ""))
        if seen[-1] == "Bearer sesame":
            route.fulfill(json={"data": [{"id": "base"}]})
        else:
            error = {"message": "this server needs a key", "code": 401}
            route.fulfill(status=401, json={"error": error})

    page.route("**/v1/models", answer_models)
    page.goto(served.url)
    page.fill("#key-input", "sesame")
    assert "needs a key" in page.inner_text("#key-text")
    page.press("#key-input", "Enter")
    wait_until(page, "document.getElementById('model').textContent == 'base'")
    assert seen == ["", "Bearer sesame"]
