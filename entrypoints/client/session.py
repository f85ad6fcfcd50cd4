"""Tracks a client's unfinished requests and commands, without a connection."""

import itertools
import operator
from collections.abc import Sequence
from typing import Any, Protocol

from loraplex.engine.errors import LoraplexError, error_from_reply
from loraplex.engine.frontend.sampling_params import RequestOutputKind, SamplingParams
from loraplex.entrypoints.client.lora_mix import LoRA, LoRAMix
from loraplex.entrypoints.client.lora_request import LoRARequest
from loraplex.entrypoints.client.output_assembler import Message, OutputAssembler
from loraplex.entrypoints.client.outputs import RequestFailure, RequestOutput, RequestResult

Prompt = str | list[int] | dict[str, Any]
"""Text, token ids, or a map with one of "prompt", "prompt_token_ids" and "messages".

A map with "messages" (a chat) may also hold "add_generation_prompt", "continue_final_message",
"tools", "documents" and "chat_template_kwargs".
"""

_PROMPT_KEYS = (
    "prompt", "prompt_token_ids", "messages", "add_generation_prompt", "continue_final_message",
    "tools", "documents", "chat_template_kwargs",
)  # fmt: skip


class Transport(Protocol):
    """Carries messages to a frontend and back: a socket, or an engine in this process.

    Attributes:
        is_local: the frontend may be on this machine, so that it can open this process's memory.
        max_message_bytes: the most bytes of one frame, 0 if it is not known.
    """

    is_local: bool
    max_message_bytes: int

    def send(self, message: Message, frames: Sequence[memoryview] = ()) -> None:
        """Sends a message, and the frames that belong to it."""

    def receive(self, timeout_s: float | None) -> list[Message]:
        """Returns replies in order, [] after `timeout_s`.

        Raises:
            EngineDeadError: the connection is lost and every reply was returned.
        """

    def is_lost(self) -> bool:
        """Tells whether the connection is lost. Replies that came before can still be received."""

    def close(self) -> None: ...


class ClientSession:
    """Makes the messages that a client sends, and results of the replies to them."""

    def __init__(self) -> None:
        self._requests: dict[str, OutputAssembler] = {}
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
        adapter: str | LoRA | None,
        request_id: str | None,
        salt: str,
        priority: int,
        stream: bool,
        deadline_s: float | None = None,
    ) -> tuple[str, Message]:
        """Begins a request. Returns its id and the message to send.

        Raises:
            TypeError, ValueError: the prompt has an unknown form, or the id is in use.
        """
        params = sampling_params if sampling_params is not None else SamplingParams()
        request_id = self._new_id() if request_id is None else request_id
        if request_id in self._requests:
            raise ValueError(
                f"request {request_id!r} is not finished yet: choose another request_id"
            )
        fields = _prompt_fields(prompt)
        lora_request = None if isinstance(adapter, str) else adapter
        message = {
            "type": "generate",
            "request_id": request_id,
            **fields,
            "sampling_params": params.to_wire(),
            **_adapter_fields(adapter),
            "salt": salt,
            "priority": priority,
            "stream": stream,
            "return_prompt_token_ids": "prompt_token_ids" not in fields,
            "timeout_s": deadline_s,
        }
        request = RequestOutput(
            request_id,
            prompt=fields.get("prompt"),
            prompt_token_ids=fields.get("prompt_token_ids"),
            lora_request=lora_request,
        )
        kind = params.output_kind if stream else RequestOutputKind.FINAL_ONLY
        self._requests[request_id] = OutputAssembler(request, params.n, kind)
        return request_id, message

    def command(self, kind: str, /, **values: Any) -> tuple[str, Message]:
        """Begins a command. Returns its id and the message to send."""
        request_id = self._new_id()
        self._commands.add(request_id)
        return request_id, {"type": kind, "request_id": request_id, **values}

    def forget(self, request_id: str) -> None:
        """Ignores later replies to a request or command."""
        self._requests.pop(request_id, None)
        self._commands.discard(request_id)

    def on_reply(self, reply: Message) -> tuple[str, RequestResult | Message] | None:
        """Returns the id of a request or command and its result.

        The result is a RequestOutput or RequestFailure for a request, the reply itself or a
        RequestFailure for a command. Returns None if the reply belongs to neither.
        """
        request_id = reply.get("request_id", "")
        if request_id in self._commands:
            self._commands.discard(request_id)
            if reply["type"] == "error":
                return request_id, _failure(reply)
            return request_id, reply
        assembler = self._requests.get(request_id)
        if assembler is None:
            return None
        if reply["type"] == "error":
            del self._requests[request_id]
            return request_id, _failure(reply)
        output = assembler.add(reply)
        if output.finished:
            del self._requests[request_id]
        return request_id, output

    def fail_all(self, error: LoraplexError) -> list[RequestFailure]:
        """Ends every request and command with `error`."""
        failures = [RequestFailure(request_id, error) for request_id in self.unfinished]
        self._requests.clear()
        self._commands.clear()
        return failures

    def _new_id(self) -> str:
        while True:
            request_id = f"r{next(self._numbers)}"
            if request_id not in self._requests:
                return request_id


def _adapter_fields(adapter: str | LoRA | None) -> Message:
    if isinstance(adapter, LoRAMix):
        return {"adapters": adapter.to_wire()}
    if not isinstance(adapter, LoRARequest):
        return {"adapter": adapter or ""}
    fields: Message = {"adapter": adapter.lora_name}
    if adapter.lora_path:
        fields |= {"adapter_path": adapter.lora_path, "load_inplace": adapter.load_inplace}
    return fields


def _prompt_fields(prompt: Prompt) -> Message:
    if isinstance(prompt, str):
        return {"prompt": prompt}
    fields = {"prompt_token_ids": prompt} if isinstance(prompt, list) else prompt
    if not isinstance(fields, dict):
        raise TypeError(f"a prompt must be text, token ids or a map, got {prompt!r:.80}")
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
