"""Builds what the answers of completions and chats have in common: head, events and usage."""

import time
from abc import ABC, abstractmethod
from typing import Any

import msgspec

DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode


def event(value: dict[str, Any]) -> bytes:
    """Returns a server-sent event with a JSON object."""
    return b"data: " + _encode(value) + b"\n\n"


def to_json(value: Any) -> bytes:
    return _encode(value)


class BaseAnswer(ABC):
    """Collects choices for one JSON object, or makes an event of each.

    Implements exchange.py's Answer but for `choices`.

    Attributes:
        model: the name by which the request called its model.
        request_id: the id of the HTTP request.
        streams: True for events.
    """

    prefix = ""
    whole = ""  # "object" of an answer
    chunk = ""  # "object" of an event

    def __init__(
        self,
        *,
        model: str,
        request_id: str,
        streams: bool,
        include_usage: bool,
        shows_tokens: bool,
    ) -> None:
        """Makes an answer without choices.

        Args:
            request_id: becomes a part of the answer's id.
            include_usage: a stream ends with the usage, and each event before has usage null.
            shows_tokens: tokens without text show too, by logprobs or ids.
        """
        self._shows_tokens = shows_tokens
        self.model = model
        self.request_id = request_id
        self.streams = streams
        self._include_usage = include_usage
        self._choices: list[dict[str, Any]] = []
        self._usage = {"prompt_tokens": 0, "completion_tokens": 0, "cached_tokens": 0}
        self._head = {
            "id": f"{self.prefix}-{request_id}",
            "object": self.chunk if streams else self.whole,
            "created": int(time.time()),
            "model": model,
        }
        self._tail: dict[str, Any] = {"usage": None} if streams and include_usage else {}

    @abstractmethod
    def choices(self, index: int, reply: dict[str, Any]) -> list[dict[str, Any]]:
        """Returns the choices that a reply to the prompt `index` brings or adds to."""

    def has_part(self, entry: dict[str, Any]) -> bool:
        """Tells whether an entry of "outputs" has something for the client."""
        return bool(
            entry["text"] or entry["finish_reason"] or self._shows_tokens or not self.streams
        )

    def extras(self) -> dict[str, Any]:
        """Returns more fields of a whole answer."""
        return {}

    def add(self, index: int, reply: dict[str, Any]) -> bytes:
        for key, value in reply.get("usage", {}).items():
            self._usage[key] += value
        choices = self.choices(index, reply)
        if self.streams:
            return b"".join(map(self._event, choices))
        self._choices += choices
        return b""

    def end(self) -> bytes:
        if self.streams:
            usage = {**self._head, "choices": [], "usage": self.usage}
            return (event(usage) if self._include_usage else b"") + DONE
        self._choices.sort(key=lambda choice: choice["index"])
        return to_json(
            {**self._head, "choices": self._choices, "usage": self.usage, **self.extras()}
        )

    @property
    def usage(self) -> dict[str, Any]:
        """The tokens of all prompts and answers, in OpenAI's shape."""
        prompt, completion = self._usage["prompt_tokens"], self._usage["completion_tokens"]
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self._usage["cached_tokens"]},
        }

    def _event(self, choice: dict[str, Any]) -> bytes:
        return event({**self._head, "choices": [choice], **self._tail})
