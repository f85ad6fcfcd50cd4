"""Builds the answers of POST /v1/chat/completions."""

from typing import Any

from loraplex.engine.frontend.inputs import TextCodec
from loraplex.entrypoints.http.answers.base_answer import BaseAnswer
from loraplex.entrypoints.http.answers.logprobs import chat_logprobs, prompt_logprobs
from loraplex.entrypoints.http.requests.bodies import ChatBody


class ChatAnswer(BaseAnswer):
    prefix = "chatcmpl"
    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def __init__(self, body: ChatBody, *, model: str, codec: TextCodec | None) -> None:
        options = body.stream_options
        super().__init__(
            model=model,
            streams=bool(body.stream),
            include_usage=options is not None and options.include_usage,
            shows_tokens=bool(body.logprobs or body.return_token_ids),
        )
        self._body = body
        self._codec = codec
        self._begun: set[int] = set()  # indices of choices that have had an event
        self._prompt: dict[str, Any] = {}

    def choices(self, index: int, reply: dict[str, Any]) -> list[dict[str, Any]]:
        if "prompt_token_ids" in reply:
            self._prompt["prompt_token_ids"] = reply["prompt_token_ids"]
        if "prompt_logprobs" in reply:
            self._prompt["prompt_logprobs"] = prompt_logprobs(reply["prompt_logprobs"])
        if not self.streams:
            return [self._whole_choice(entry) for entry in reply["outputs"]]
        return [choice for entry in reply["outputs"] for choice in self._deltas(entry)]

    def extras(self) -> dict[str, Any]:
        return {"prompt_logprobs": None, **self._prompt}

    def _whole_choice(self, entry: dict[str, Any]) -> dict[str, Any]:
        message = {"role": "assistant", "content": entry["text"]}
        return {"message": message, **self._fields(entry)}

    def _deltas(self, entry: dict[str, Any]) -> list[dict[str, Any]]:
        """Returns the part of a choice that is new. The first one is preceded by the role."""
        has_part = self.has_part(entry)
        delta = {"delta": {"content": entry["text"]}, **self._fields(entry)}
        if entry["index"] in self._begun:
            return [delta] if has_part else []
        self._begun.add(entry["index"])
        role = {"role": "assistant", "content": ""}
        first = {"index": entry["index"], "delta": role, "logprobs": None, "finish_reason": None}
        if self._body.return_token_ids:
            first |= self._prompt
        return [first, delta] if has_part else [first]

    def _fields(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Returns the fields that a whole choice and a delta share."""
        fields = {
            "index": entry["index"],
            "logprobs": None,
            "finish_reason": entry["finish_reason"],
            "stop_reason": entry["stop_reason"],
        }
        if self._body.logprobs:
            num_top = self._body.top_logprobs or 0
            fields["logprobs"] = chat_logprobs(entry["logprobs"], num_top, self._codec)
        if self._body.return_token_ids:
            fields["token_ids"] = entry["token_ids"]
        return fields
