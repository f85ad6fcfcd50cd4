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
from loraplex.engine.tokenizer.chat_messages import normalize_messages

_MARKER = "END_OF_THE_LAST_MESSAGE_7f3a "  # appended to the last message to find its end


class ChatTemplate:
    """A compiled template, and a second one for chats with tools if the model has two.

    Raises:
        ConfigError: the template is not valid Jinja.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], *, tool_source: str | None = None
    ) -> None:
        """`special_tokens` maps names such as bos_token to texts; the template can read them."""
        self._special_tokens = dict(special_tokens)
        self._template = _compile(source)
        self._tool_template = self._template if tool_source is None else _compile(tool_source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Returns the prompt of one chat. Encode it with add_special_tokens=False.

        Args:
            messages: maps with a `role` and a `content`: text or a list of text parts.
            add_generation_prompt: end with the header of the assistant's answer.
            continue_final_message: leave the last message open, so that the model continues it.
            tools: JSON schemas of functions; None if there are none, as templates test for it.
            documents: maps with `title` and `text`.
            variables: more names for the template, such as `enable_thinking`.

        Raises:
            ClientError: the messages are malformed, or the template refuses them.
        """
        template = self._template if tools is None else self._tool_template
        has_parts = _has_parts(messages)
        chat = normalize_messages(messages, takes_parts=has_parts and self._takes_parts(template))
        if continue_final_message:
            if add_generation_prompt:
                raise ClientError(
                    "continue_final_message needs add_generation_prompt=false: the answer "
                    "continues the last message instead of starting a new one"
                )
            chat[-1] = _with_marker(chat[-1])
        values = {
            **self._special_tokens,
            "messages": chat,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = template.render({**values, **variables})
        except Exception as error:  # a template can raise any exception
            raise ClientError(f"the chat template refuses these messages: {error}") from None
        return _cut_at_marker(text) if continue_final_message else text

    def _takes_parts(self, template: jinja2.Template) -> bool:
        """Tells whether the template writes the texts of a content that is a list of parts."""
        chat = [{"role": "user", "content": [{"type": "text", "text": "PROBE"}]}]
        values = {"messages": chat, "tools": None, "documents": None, "add_generation_prompt": True}
        try:
            text = template.render({**self._special_tokens, **values})
        except Exception:  # it adds strings
            return False
        return "PROBE" in text and "'text'" not in text and '"text"' not in text


def _compile(source: str) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"chat template, line {error.lineno}: {error.message}") from None


def _has_parts(messages: Sequence[Mapping[str, Any]]) -> bool:
    return isinstance(messages, Sequence) and any(
        isinstance(message, Mapping) and isinstance(message.get("content"), list | tuple)
        for message in messages
    )


def _with_marker(message: dict[str, Any]) -> dict[str, Any]:
    """Appends the marker to the last text of a message."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + _MARKER}
    if not content:
        raise ClientError("continue_final_message needs a last message with text")
    last = {**content[-1], "text": content[-1]["text"] + _MARKER}
    return {**message, "content": [*content[:-1], last]}


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
