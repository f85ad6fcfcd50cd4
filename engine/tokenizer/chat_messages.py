"""Brings the messages of a chat into the form that chat templates of Hugging Face expect."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from loraplex.engine.errors import ClientError

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_REASONING = ("reasoning_content", "thinking", "reasoning")


def normalize_messages(messages: object, *, takes_parts: bool) -> list[dict[str, Any]]:
    """Returns new messages without the keys that are None; the content of calls alone is "".

    A `content` of parts stays a list if the template `takes_parts`; otherwise the texts are joined
    by line breaks, as in vLLM. Arguments of tool calls become maps, and reasoning gets all the
    names under which templates read it.

    Raises:
        ClientError: a message is malformed or holds something other than text.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise ClientError("messages must be a list of at least one {role, content}")
    return [_message(index, message, takes_parts) for index, message in enumerate(messages)]


def _message(index: int, message: object, takes_parts: bool) -> dict[str, Any]:
    where = f"message {index}"
    if not isinstance(message, Mapping):
        raise ClientError(f"{where} must be a map with role and content")
    if not isinstance(message.get("role"), str):
        raise ClientError(f"{where}: role must be a string")
    result = {key: value for key, value in message.items() if value is not None}
    content = result.get("content")
    if isinstance(content, list | tuple):
        parts = [_text_part(f"{where}, part {i}", part) for i, part in enumerate(content)]
        texts = [{"type": "text", "text": part} for part in parts]
        result["content"] = texts if takes_parts else "\n".join(parts)
    elif "content" in result and not isinstance(content, str):
        raise ClientError(f"{where}: content must be a string or a list of parts")
    elif "content" not in result:
        if not result.get("tool_calls"):
            raise ClientError(
                f"{where}: content must be a string or a list of parts, it is missing"
            )
        result["content"] = ""  # many templates read it without a test
    if "tool_calls" in result:
        result["tool_calls"] = _tool_calls(where, result["tool_calls"])
    reasoning = next((result[name] for name in _REASONING if name in result), None)
    if reasoning is not None:
        result = {"thinking": reasoning, **result, "reasoning_content": reasoning}
    return result


def _text_part(where: str, part: object) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ClientError(f"{where} of the message must be text or a map with a type")
    key = _TEXT_PARTS.get(str(part.get("type")))
    if key is None:
        raise ClientError(
            f"{where} of the message has type {part.get('type')!r:.40}: this model reads text alone"
        )
    if not isinstance(part.get(key), str):
        raise ClientError(f"{where} of the message: {key} must be a string")
    return str(part[key])


def _tool_calls(where: str, calls: object) -> list[Any]:
    """Returns the calls with their arguments as maps; OpenAI's clients send them as JSON text."""
    if not isinstance(calls, list | tuple) or not all(isinstance(call, Mapping) for call in calls):
        raise ClientError(f"{where}: tool_calls must be a list of maps")
    return [_tool_call(where, call) for call in calls]


def _tool_call(where: str, call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping):
        return dict(call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            raise ClientError(
                f"{where}: the arguments of tool call {function.get('name')!r:.40} are not JSON"
            ) from None
    return {**call, "function": {**function, "arguments": {} if arguments is None else arguments}}
