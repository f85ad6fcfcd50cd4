"""Joins the events of the openai client's streams."""

from collections.abc import Iterable
from typing import Any

Answers = dict[int, tuple[str, str | None]]
"""Text and finish reason by the index of the choice."""


def text_streamed(stream: Iterable[Any]) -> Answers:
    """Returns the answers of a stream of completions."""
    return _join(stream, lambda choice: choice.text)


def chat_streamed(stream: Iterable[Any]) -> Answers:
    """Returns the answers of a stream of a chat. Each choice must begin with its role."""
    roles: dict[int, list[Any]] = {}

    def text_of(choice: Any) -> str:
        roles.setdefault(choice.index, []).append(choice.delta.role)
        return choice.delta.content or ""

    answers = _join(stream, text_of)
    for given in roles.values():
        assert given[0] == "assistant" and not any(given[1:])
    return answers


def _join(stream: Iterable[Any], text_of: Any) -> Answers:
    answers: Answers = {}
    for chunk in stream:
        for choice in chunk.choices:
            text, reason = answers.get(choice.index, ("", None))
            assert reason is None, "an event follows the end of its choice"
            answers[choice.index] = (text + text_of(choice), choice.finish_reason)
    return answers
