"""Checks the prompts of an offline call and turns them into those of Client.submit."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

if TYPE_CHECKING:
    from loraplex.engine.tokenizer.tokenizer import Tokenizer


class TextPrompt(TypedDict):
    """A prompt of text; the class and its fields are vLLM's."""

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """A prompt of token ids, of which `prompt` is the text; it is ignored."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


Prompt = str | list[int] | Mapping[str, Any] | TextPrompt | TokensPrompt
"""Text, token ids, or a map with "prompt" (text) or "prompt_token_ids", and a "cache_salt"."""

Message = dict[str, Any]
"""One message of a conversation: "role" and "content"."""

_PROMPT_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}


def completion_prompts(prompts: Prompt | Sequence[Prompt]) -> list[dict[str, Any]]:
    """Returns one prompt or many as new maps.

    Raises:
        ValueError, TypeError: a prompt has unknown keys, is empty or of the wrong type.
    """
    many = [prompts] if isinstance(prompts, str | dict) or _is_token_ids(prompts) else prompts
    if not isinstance(many, Sequence):
        raise TypeError(f"prompts must be a prompt or a list of prompts, got {prompts!r:.80}")
    return [_completion_prompt(index, prompt) for index, prompt in enumerate(many)]


def chat_prompts(
    messages: Sequence[Message] | Sequence[Sequence[Message]],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
    **options: Any,
) -> list[dict[str, Any]]:
    """Returns one conversation or many as prompts that hold "messages" and the options.

    Raises:
        ValueError, TypeError: a conversation is empty or has a message without a role.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise TypeError(f"messages must be a list of maps, got {messages!r:.80}")
    if not messages:
        return []
    is_one = isinstance(messages[0], dict)
    conversations: Sequence[Any] = [messages] if is_one else messages
    if add_generation_prompt and continue_final_message:
        raise ValueError(
            "continue_final_message needs add_generation_prompt=False: the answer continues the "
            "last message instead of starting a new one"
        )
    for index, conversation in enumerate(conversations):
        _check_conversation(index, conversation)
    return [
        {
            "messages": [dict(message) for message in conversation],
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            **{name: value for name, value in options.items() if value is not None},
        }
        for conversation in conversations
    ]


def rendered(prompt: dict[str, Any], tokenizer: "Tokenizer", chat_template: str) -> dict[str, Any]:
    """Returns a prompt of token ids for one that holds "messages".

    Raises:
        ClientError: the template refuses the messages.
        ConfigError: the template is not valid Jinja.
    """
    options = {key: value for key, value in prompt.items() if key != "messages"}
    options |= options.pop("chat_template_kwargs", {})
    token_ids = tokenizer.apply_chat_template(
        prompt["messages"], tokenize=True, chat_template=chat_template, **options
    )
    return {"prompt_token_ids": token_ids}


def _is_token_ids(prompt: object) -> bool:
    return isinstance(prompt, list | tuple) and bool(prompt) and isinstance(prompt[0], int)


def _completion_prompt(index: int, prompt: object) -> dict[str, Any]:
    where = f"prompts[{index}]"
    if isinstance(prompt, str):
        prompt = {"prompt": prompt}
    elif isinstance(prompt, list | tuple):
        prompt = {"prompt_token_ids": prompt}
    if not isinstance(prompt, dict):
        raise TypeError(
            f'{where} must be text, ids, {{"prompt": text}} or {{"prompt_token_ids": [...]}}, '
            f"got {prompt!r:.80}"
        )
    given = {key: value for key, value in prompt.items() if value is not None}
    unknown = sorted(str(key) for key in given.keys() - _PROMPT_KEYS)
    if unknown:
        raise ValueError(f"{where} has unknown keys {unknown}; known: {sorted(_PROMPT_KEYS)}")
    if "prompt_token_ids" in given:
        given.pop("prompt", None)  # as in vLLM, the ids are the prompt; the text is ignored
        given["prompt_token_ids"] = _token_ids(where, given["prompt_token_ids"])
    elif not isinstance(given.get("prompt"), str):
        raise TypeError(f'{where} needs "prompt" (text) or "prompt_token_ids"')
    return given


def _token_ids(where: str, values: object) -> list[int]:
    if not isinstance(values, Iterable) or isinstance(values, str | bytes):
        raise TypeError(f"{where}: prompt_token_ids must be a list of integers")
    try:
        token_ids = [operator.index(value) for value in values]  # accepts NumPy's integers
    except TypeError as error:
        raise TypeError(f"{where}: prompt_token_ids must be integers: {error}") from None
    if not token_ids:
        raise ValueError(f"{where}: prompt_token_ids is empty: give at least one id")
    return token_ids


def _check_conversation(index: int, conversation: object) -> None:
    where = f"messages[{index}]"
    if not isinstance(conversation, Sequence) or not conversation:
        raise ValueError(f"{where} must be a list of at least one message")
    for message in conversation:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise TypeError(f'{where} holds {message!r:.80}; it needs "role" and "content"')
