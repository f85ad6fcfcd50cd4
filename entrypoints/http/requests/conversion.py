"""Turns the bodies of HTTP requests into messages of the client protocol."""

from typing import Any

from loraplex.entrypoints.http.errors import HttpError
from loraplex.entrypoints.http.requests.bodies import (
    ChatBody,
    CompletionBody,
    GenerationBody,
    TokenizeBody,
)
from loraplex.entrypoints.http.requests.structured import structured_outputs
from loraplex.entrypoints.http.requests.unsupported import check_extra_fields

MAX_PROMPTS = 1024  # of one request for completions

_SAMPLING = (
    "n", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "seed", "stop", "stop_token_ids", "ignore_eos",
    "logit_bias", "allowed_token_ids", "bad_words", "prompt_logprobs", "skip_special_tokens",
    "include_stop_str_in_output",
)  # fmt: skip
_CHAT = (
    "add_generation_prompt", "continue_final_message", "tools", "documents", "chat_template_kwargs",
)  # fmt: skip

Message = dict[str, Any]


def completion_messages(body: CompletionBody, adapter: str, defaults: Message) -> list[Message]:
    """Returns one "generate" message for each prompt.

    Args:
        adapter: the adapter's name, "" for the base model.
        defaults: sampling parameters of requests that leave them out.

    Raises:
        HttpError: the body asks for something that is not supported.
    """
    params = _sampling_params(body, defaults)
    params["max_tokens"] = 16 if body.max_tokens is None else body.max_tokens
    if body.logprobs is not None:
        params["logprobs"] = body.logprobs
    if body.echo:
        if body.max_tokens == 0:
            params["max_tokens"] = 1  # CompletionAnswer drops the token
        if body.logprobs is not None:
            params["prompt_logprobs"] = body.logprobs
    common = _common(body, adapter, params)
    needs_ids = bool(body.echo or body.return_token_ids)
    return [
        {**common, **prompt, "return_prompt_token_ids": needs_ids}
        for prompt in _prompts(body.prompt)
    ]


def chat_message(
    body: ChatBody,
    adapter: str,
    defaults: Message,
    *,
    finds_calls: bool = False,
    forced_schema: dict[str, Any] | None = None,
) -> Message:
    """Returns the "generate" message of a chat.

    Args:
        adapter: the adapter's name, "" for the base model.
        defaults: sampling parameters of requests that leave them out.
        finds_calls: function calls are looked for in the answer.
        forced_schema: JSON schema that the answer must have, for calls that are forced.

    Raises:
        HttpError: the body asks for something that is not supported.
    """
    if body.top_logprobs is not None and not body.logprobs:
        raise HttpError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    params = _sampling_params(body, defaults)
    limits = (body.max_completion_tokens, body.max_tokens, defaults.get("max_tokens"))
    params["max_tokens"] = next((limit for limit in limits if limit is not None), None)
    if forced_schema is not None:
        if params.get("structured_outputs") is not None:
            raise HttpError(
                400,
                "a tool_choice that forces calls sets the form of the answer: leave out "
                "response_format and structured_outputs",
                param="tool_choice",
            )
        params["structured_outputs"] = {"json": forced_schema}
    elif finds_calls:
        params.setdefault("skip_special_tokens", False)  # they may mark the calls
    if body.logprobs:
        params["logprobs"] = body.top_logprobs or 0
    return {
        **_common(body, adapter, params),
        **_fields(body, _CHAT),
        "messages": body.messages,
        "return_prompt_token_ids": bool(body.return_token_ids),
    }


def tokenize_message(body: TokenizeBody) -> Message:
    """Returns a "generate" message with the same prompt."""
    message = _fields(body, ("prompt", "messages"))
    if "messages" in message:
        message |= _fields(body, _CHAT)
    return {"type": "generate", "request_id": "0", **message}


def _sampling_params(body: GenerationBody, defaults: Message) -> Message:
    check_extra_fields(body.model_extra or {})
    if body.stream and body.prompt_logprobs is not None:
        raise HttpError(400, "prompt_logprobs needs stream: false", param="prompt_logprobs")
    if body.stream_options is not None and not body.stream:
        raise HttpError(400, "stream_options needs stream: true", param="stream_options")
    form = structured_outputs(body.response_format, body.structured_outputs)
    return (
        defaults | _fields(body, _SAMPLING) | ({} if form is None else {"structured_outputs": form})
    )


def _common(body: GenerationBody, adapter: str, params: Message) -> Message:
    mix = {} if body.adapters is None else {"adapters": body.adapters}
    return {
        **mix,
        "type": "generate",
        "sampling_params": params,
        "adapter": adapter,
        "salt": body.cache_salt or "",
        "priority": body.priority or 0,
        "stream": bool(body.stream),
        "timeout_s": body.timeout_s,
    }


def _fields(body: Any, names: tuple[str, ...]) -> Message:
    """Returns the fields that the body has and that are not None."""
    values = {name: getattr(body, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _prompts(prompt: str | list[Any] | None) -> list[Message]:
    """Returns the prompts as texts or token ids.

    Raises:
        HttpError: there is none, or the list has another form.
    """
    if isinstance(prompt, str):
        return [{"prompt": prompt}]
    if not prompt:
        raise HttpError(400, "prompt must have a text or token ids", param="prompt")
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return [{"prompt_token_ids": prompt}]
    if len(prompt) > MAX_PROMPTS:
        raise HttpError(
            400, f"prompt has {len(prompt)} texts: send at most {MAX_PROMPTS}", param="prompt"
        )
    if kinds == {str}:
        return [{"prompt": text} for text in prompt]
    if kinds == {list}:
        return [{"prompt_token_ids": ids} for ids in prompt]
    raise HttpError(
        400,
        "prompt must be a text, a list of texts, a list of token ids, or a list of such lists",
        param="prompt",
    )
