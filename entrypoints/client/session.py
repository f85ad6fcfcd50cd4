"""A client's state without its connection: what it sends, and what the replies make of it."""

import itertools
import operator
from typing import Any, Protocol

from loraplex.engine.errors import LoraplexError
from loraplex.engine.frontend.protocol import error_from_reply
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.entrypoints.client.lora_request import LoRARequest
from loraplex.entrypoints.client.outputs import (
    CompletionOutput,
    Logprob,
    PositionLogprobs,
    RequestFailure,
    RequestOutput,
)

Prompt = str | list[int] | dict[str, Any]
"""Text, token ids, or a map with one of "prompt", "prompt_token_ids" and "messages" (a chat;
it may also hold "add_generation_prompt" and "continue_final_message")."""

_PROMPT_KEYS = (
    "prompt", "prompt_token_ids", "messages", "add_generation_prompt", "continue_final_message",
)  # fmt: skip

News = RequestOutput | RequestFailure
Message = dict[str, Any]


class Transport(Protocol):
    """How maps reach a frontend: a socket, or an engine in this process."""

    def send(self, message: Message) -> None: ...

    def receive(self, timeout_s: float | None) -> list[Message]:
        """Replies, in order; [] after `timeout_s`. EngineDeadError when there will be no more."""

    def is_lost(self) -> bool:
        """Whether receive() has nothing to give but what came before the loss."""

    def close(self) -> None: ...


class ClientSession:
    """The requests and commands of one client that have no end yet."""

    def __init__(self) -> None:
        self._requests: dict[str, RequestOutput] = {}
        self._commands: set[str] = set()
        self._numbers = itertools.count(1)

    @property
    def unfinished(self) -> list[str]:
        return [*self._requests, *self._commands]

    def has(self, request_id: str) -> bool:
        return request_id in self._requests

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None,
        *,
        adapter: str | LoRARequest | None,
        request_id: str | None,
        salt: str,
        priority: int,
        stream: bool,
    ) -> tuple[str, Message]:
        """A new request: its id, and the message to send.

        Raises:
            TypeError, ValueError: the prompt is of no known form, or the id is in use.
        """
        params = sampling_params if sampling_params is not None else SamplingParams()
        request_id = self._new_id() if request_id is None else request_id
        if request_id in self._requests:
            raise ValueError(f"request {request_id!r} is not finished yet")
        fields = _prompt_fields(prompt)
        lora_request = adapter if isinstance(adapter, LoRARequest) else None
        name = adapter.lora_name if isinstance(adapter, LoRARequest) else adapter
        message = {
            "type": "generate",
            "request_id": request_id,
            **fields,
            "sampling_params": params.to_wire(),
            "adapter": name or "",
            "salt": salt,
            "priority": priority,
            "stream": stream,
            "return_prompt_token_ids": "prompt_token_ids" not in fields,
        }
        self._requests[request_id] = RequestOutput(
            request_id,
            prompt=fields.get("prompt"),
            prompt_token_ids=fields.get("prompt_token_ids"),
            outputs=[CompletionOutput(i, lora_request=lora_request) for i in range(params.n)],
            lora_request=lora_request,
        )
        return request_id, message

    def command(self, kind: str, /, **values: Any) -> tuple[str, Message]:
        """A command that is answered: its id, and the message to send."""
        request_id = self._new_id()
        self._commands.add(request_id)
        return request_id, {"type": kind, "request_id": request_id, **values}

    def forget(self, request_id: str) -> None:
        """Replies to it are ignored from now on."""
        self._requests.pop(request_id, None)
        self._commands.discard(request_id)

    def on_reply(self, reply: Message) -> tuple[str, News | Message] | None:
        """What a reply brings to which request or command; None for what concerns none of ours.

        A RequestOutput is a snapshot: later replies do not change it.
        """
        request_id = reply.get("request_id", "")
        if request_id in self._commands:
            self._commands.discard(request_id)
            if reply["type"] == "error":
                return request_id, _failure(reply)
            return request_id, reply
        output = self._requests.get(request_id)
        if output is None:
            return None
        if reply["type"] == "error":
            del self._requests[request_id]
            return request_id, _failure(reply)
        _extend(output, reply)
        if output.finished:
            del self._requests[request_id]
            return request_id, output
        return request_id, output.snapshot()

    def fail_all(self, error: LoraplexError) -> list[RequestFailure]:
        """The engine is lost: every request and command ends with `error`."""
        failures = [RequestFailure(request_id, error) for request_id in self.unfinished]
        self._requests.clear()
        self._commands.clear()
        return failures

    def _new_id(self) -> str:
        while True:
            request_id = f"r{next(self._numbers)}"
            if request_id not in self._requests:
                return request_id


def _prompt_fields(prompt: Prompt) -> Message:
    if isinstance(prompt, str):
        return {"prompt": prompt}
    fields = {"prompt_token_ids": prompt} if isinstance(prompt, list) else prompt
    if not isinstance(fields, dict):
        raise TypeError(f"a prompt is text, a list of token ids or a map, got {prompt!r:.80}")
    unknown = [key for key in fields if key not in _PROMPT_KEYS]
    if unknown:
        raise ValueError(f"unknown keys in a prompt: {unknown}; known: {list(_PROMPT_KEYS)}")
    if fields.get("prompt_token_ids") is not None:
        token_ids = [operator.index(token_id) for token_id in fields["prompt_token_ids"]]
        fields = {**fields, "prompt_token_ids": token_ids}
    return {key: value for key, value in fields.items() if value is not None}


def _failure(reply: Message) -> RequestFailure:
    error = error_from_reply(reply.get("code", "internal"), reply.get("message", ""))
    return RequestFailure(reply.get("request_id", ""), error)


def _extend(output: RequestOutput, reply: Message) -> None:
    """Add an "output" message to what the request has so far."""
    if "prompt_token_ids" in reply:
        output.prompt_token_ids = reply["prompt_token_ids"]
    if "prompt_logprobs" in reply:
        output.prompt_logprobs = (output.prompt_logprobs or []) + [
            None if entries is None else _position(entries) for entries in reply["prompt_logprobs"]
        ]
    for entry in reply["outputs"]:
        _extend_completion(output.outputs[entry["index"]], entry)
    output.finished = reply["finished"]
    if output.finished:
        output.num_cached_tokens = reply["usage"]["cached_tokens"]


def _extend_completion(completion: CompletionOutput, entry: Message) -> None:
    completion.text += entry["text"]
    completion.token_ids += entry["token_ids"]
    completion.finish_reason = entry["finish_reason"]
    completion.stop_reason = entry["stop_reason"]
    if "logprobs" in entry:
        chosen = sum(entries[0][1] for entries in entry["logprobs"])
        completion.cumulative_logprob = (completion.cumulative_logprob or 0.0) + chosen
        completion.logprobs = (completion.logprobs or []) + [
            _position(entries) for entries in entry["logprobs"]
        ]


def _position(entries: list[list[Any]]) -> PositionLogprobs:
    return {token_id: Logprob(logprob, rank, text) for token_id, logprob, rank, text in entries}
