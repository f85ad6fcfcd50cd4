"""Renders a chat to a prompt with the model's Jinja template, in Hugging Face's sandbox."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from loraplex.engine.errors import ClientError, ConfigError

_MARKER = "END_OF_THE_LAST_MESSAGE_7f3a "  # appended to the last message to find its end


class ChatTemplate:
    """A compiled template.

    Raises:
        ConfigError: the template is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` maps names such as bos_token to texts; the template can read them."""
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"chat template, line {error.lineno}: {error.message}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """Returns the prompt of one chat. Encode it with add_special_tokens=False.

        Args:
            messages: maps with a `role` and a `content` of text.
            add_generation_prompt: end with the header of the assistant's answer.
            continue_final_message: leave the last message open, so that the model continues it.
            variables: more names for the template, such as `tools` or `enable_thinking`.

        Raises:
            ClientError: the messages are malformed, or the template refuses them.
        """
        _check(messages)
        if continue_final_message:
            if add_generation_prompt:
                raise ClientError(
                    "continue_final_message needs add_generation_prompt=false: the answer "
                    "continues the last message instead of starting a new one"
                )
            last = {**messages[-1], "content": messages[-1]["content"] + _MARKER}
            messages = [*messages[:-1], last]
        try:
            text = self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                **{**self._special_tokens, **variables},
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise ClientError(f"the chat template refuses these messages: {error}") from None
        return _cut_at_marker(text) if continue_final_message else text


def _check(messages: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise ClientError("messages must be a list of at least one {role, content}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ClientError(f"message {index} must be a map with role and content")
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                raise ClientError(f"message {index}: {name} must be a string")


def _cut_at_marker(text: str) -> str:
    """Returns `text` up to the end of its last message.

    If the template trimmed the marker's trailing space, it trims messages; then so does this.
    """
    end = text.rfind(_MARKER.strip())
    if end < 0:
        raise ClientError(
            "continue_final_message cannot be used: the chat template drops the last message"
        )
    whole = text.startswith(_MARKER, end)
    text = text[:end].replace(_MARKER, "")
    return text if whole else text.rstrip()


class _GenerationBlock(Extension):
    """Renders the body of {% generation %}, a block that marks text to train on."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Replaces Jinja's filter, which escapes HTML. Models were trained without escapes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(fmt: str) -> str:
    return datetime.now().strftime(fmt)
