"""The rows of one offline call: what the caller gave, checked and paired up before any is sent."""

import operator
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.entrypoints.client.lora_request import LoRARequest

T = TypeVar("T")

Prompt = str | dict[str, Any]
"""Text, or a map with "prompt" (text) or "prompt_token_ids", and perhaps "cache_salt"."""

Message = dict[str, Any]
"""One turn of a conversation: "role" and "content"."""


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt with everything that goes with it. `prompt` is as Client.submit takes it."""

    prompt: dict[str, Any]
    sampling_params: SamplingParams
    adapter: LoRARequest | None
    priority: int
    salt: str


def make_rows(
    prompts: Sequence[dict[str, Any]],
    sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    lora_request: LoRARequest | Sequence[LoRARequest | None] | None,
    priority: int | Sequence[int] | None,
) -> list[Row]:
    """Pair prompts with parameters; a single value goes to every prompt.

    Raises:
        ValueError: a list is not as long as the prompts, or one adapter name has two paths.
        TypeError: a prompt, a parameter or an adapter is of the wrong type.
    """
    num = len(prompts)
    params = _spread("sampling_params", sampling_params, SamplingParams, SamplingParams(), num)
    adapters = _spread("lora_request", lora_request, LoRARequest, None, num)
    priorities = _spread("priority", priority, int, 0, num)
    rows = []
    for prompt, params_row, adapter, priority_row in zip(
        prompts, params, adapters, priorities, strict=True
    ):
        salt = prompt.pop("cache_salt", "")
        if not isinstance(salt, str):
            raise TypeError(f"cache_salt must be a string, got {salt!r}")
        rows.append(Row(prompt, params_row, _with_absolute_path(adapter), priority_row or 0, salt))
    _check_paths(rows)
    return rows


def completion_prompts(prompts: Prompt | Sequence[Prompt]) -> list[dict[str, Any]]:
    """One prompt or many, as maps of their own that may be changed."""
    many = [prompts] if isinstance(prompts, str | dict) else prompts
    if not isinstance(many, Sequence):
        raise TypeError(f"prompts must be a prompt or a list of prompts, got {prompts!r:.80}")
    return [_completion_prompt(index, prompt) for index, prompt in enumerate(many)]


def chat_prompts(
    messages: Sequence[Message] | Sequence[Sequence[Message]],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
) -> list[dict[str, Any]]:
    """One conversation or many, as prompts that hold "messages"."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise TypeError(f"messages must be a list of maps, got {messages!r:.80}")
    if not messages:
        return []
    is_one = isinstance(messages[0], dict)
    conversations: Sequence[Any] = [messages] if is_one else messages
    if add_generation_prompt and continue_final_message:
        raise ValueError("continue_final_message needs add_generation_prompt=False")
    for index, conversation in enumerate(conversations):
        _check_conversation(index, conversation)
    return [
        {
            "messages": [dict(message) for message in conversation],
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        for conversation in conversations
    ]


def _completion_prompt(index: int, prompt: object) -> dict[str, Any]:
    where = f"prompts[{index}]"
    if isinstance(prompt, str):
        prompt = {"prompt": prompt}
    if not isinstance(prompt, dict):
        raise TypeError(
            f'{where} must be text, {{"prompt": text}} or {{"prompt_token_ids": [...]}}, '
            f"got {prompt!r:.80}"
        )
    given = {key: value for key, value in prompt.items() if value is not None}
    unknown = sorted(str(key) for key in given.keys() - _PROMPT_KEYS)
    if unknown:
        raise ValueError(f"{where} has unknown keys {unknown}; known: {sorted(_PROMPT_KEYS)}")
    if "prompt_token_ids" in given:
        given.pop("prompt", None)  # as in vLLM: the ids are the prompt, the text a comment
        given["prompt_token_ids"] = _token_ids(where, given["prompt_token_ids"])
    elif not isinstance(given.get("prompt"), str):
        raise TypeError(f'{where} needs "prompt" (text) or "prompt_token_ids"')
    return given


_PROMPT_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}


def _token_ids(where: str, values: object) -> list[int]:
    if not isinstance(values, Iterable) or isinstance(values, str | bytes):
        raise TypeError(f"{where}: prompt_token_ids must be a list of integers")
    try:
        token_ids = [operator.index(value) for value in values]  # NumPy's integers too
    except TypeError as error:
        raise TypeError(f"{where}: prompt_token_ids must be integers: {error}") from None
    if not token_ids:
        raise ValueError(f"{where}: prompt_token_ids is empty")
    return token_ids


def _check_conversation(index: int, conversation: object) -> None:
    where = f"messages[{index}]"
    if not isinstance(conversation, Sequence) or not conversation:
        raise ValueError(f"{where} must be a list of at least one message")
    for message in conversation:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise TypeError(f'{where} holds {message!r:.80}; it needs "role" and "content"')


def _spread(name: str, value: Any, kind: type[T], default: Any, num: int) -> list[Any]:
    """`value` for every prompt, or the list that it is; None means `default`."""
    if value is None or isinstance(value, kind):
        return [default if value is None else value] * num
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name} must be {kind.__name__} or a list of them, got {value!r:.80}")
    if len(value) != num:
        raise ValueError(f"{num} prompts but {len(value)} entries in {name}")
    for entry in value:
        if entry is not None and not isinstance(entry, kind):
            raise TypeError(f"{name} holds {entry!r:.80}, no {kind.__name__}")
    return [default if entry is None else entry for entry in value]


def _with_absolute_path(adapter: LoRARequest | None) -> LoRARequest | None:
    """The engine's processes may run in another folder."""
    if adapter is None or not adapter.lora_path:
        return adapter
    path = os.path.abspath(os.path.expanduser(adapter.lora_path))
    return LoRARequest(adapter.lora_name, adapter.lora_int_id, path)


def _check_paths(rows: Sequence[Row]) -> None:
    paths: dict[str, str] = {}
    for row in rows:
        if row.adapter is None or not row.adapter.lora_path:
            continue
        path = paths.setdefault(row.adapter.lora_name, row.adapter.lora_path)
        if path != row.adapter.lora_path:
            raise ValueError(
                f"adapter {row.adapter.lora_name!r} is given two paths: {path} and "
                f"{row.adapter.lora_path}"
            )
