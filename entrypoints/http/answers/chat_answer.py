"""Builds the answers of POST /v1/chat/completions."""

from collections.abc import Callable
from typing import Any

from loraplex.engine.frontend.inputs import TextCodec
from loraplex.entrypoints.http.answers.base_answer import BaseAnswer
from loraplex.entrypoints.http.answers.logprobs import chat_logprobs, prompt_logprobs
from loraplex.entrypoints.http.requests.bodies import ChatBody
from loraplex.entrypoints.http.tools.call_finder import CallFinder
from loraplex.entrypoints.http.tools.parsers import ToolParser
from loraplex.entrypoints.http.tools.tool_call import ToolCall


class ChatAnswer(BaseAnswer):
    prefix = "chatcmpl"
    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def __init__(
        self,
        body: ChatBody,
        *,
        model: str,
        request_id: str,
        codec: TextCodec | None,
        make_parser: Callable[[], ToolParser] | None = None,
    ) -> None:
        """Makes an answer without choices; a parser of each finds its calls."""
        options = body.stream_options
        super().__init__(
            model=model,
            request_id=request_id,
            streams=bool(body.stream),
            include_usage=options is not None and options.include_usage,
            shows_tokens=bool(body.logprobs or body.return_token_ids),
        )
        self._body = body
        self._codec = codec
        self._begun: set[int] = set()  # indices of choices that have had an event
        self._prompt: dict[str, Any] = {}
        self._make_parser = make_parser
        self._calls: dict[int, CallFinder] = {}  # by index of the choice

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
        message: dict[str, Any] = {"role": "assistant", "content": entry["text"]}
        fields = self._fields(entry)
        if self._make_parser is not None:
            calls = self._finder(entry)
            parts = calls.take(entry)
            message["content"] = "".join(part for part in parts if isinstance(part, str)) or None
            found = [calls.as_json(part) for part in parts if isinstance(part, ToolCall)]
            if found:
                message["tool_calls"] = [
                    {key: value for key, value in call.items() if key != "index"} for call in found
                ]
            else:
                message["content"] = message["content"] or ""
            fields["finish_reason"] = calls.reason(entry)
        return {"message": message, **fields}

    def _deltas(self, entry: dict[str, Any]) -> list[dict[str, Any]]:
        """Returns the part of a choice that is new. The first one is preceded by the role."""
        deltas = self._parts(entry)
        if entry["index"] in self._begun:
            return deltas
        self._begun.add(entry["index"])
        role = {"role": "assistant", "content": ""}
        first = {"index": entry["index"], "delta": role, "logprobs": None, "finish_reason": None}
        if self._body.return_token_ids:
            first |= self._prompt
        return [first, *deltas]

    def _parts(self, entry: dict[str, Any]) -> list[dict[str, Any]]:
        if self._make_parser is None:
            delta = {"delta": {"content": entry["text"]}, **self._fields(entry)}
            return [delta] if self.has_part(entry) else []
        calls = self._finder(entry)
        deltas: list[dict[str, Any]] = [
            {"content": part} if isinstance(part, str) else {"tool_calls": [calls.as_json(part)]}
            for part in calls.take(entry)
        ]
        if not deltas and not (entry["finish_reason"] or self.has_part({**entry, "text": ""})):
            return []
        # The last delta has what is true of the entry's tokens, and of the end.
        fields = self._fields(entry) | {"finish_reason": calls.reason(entry)}
        before = {"index": entry["index"], "logprobs": None, "finish_reason": None}
        *others, last = deltas or [{}]
        return [*({"delta": delta, **before} for delta in others), {"delta": last, **fields}]

    def _finder(self, entry: dict[str, Any]) -> CallFinder:
        finder = self._calls.get(entry["index"])
        if finder is None:
            assert self._make_parser is not None
            allows_many = self._body.parallel_tool_calls is not False
            finder = CallFinder(self._make_parser(), allows_many=allows_many)
            self._calls[entry["index"]] = finder
        return finder

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
