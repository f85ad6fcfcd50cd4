"""Checks the tools that a chat request offers to the model."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from loraplex.engine.frontend.inputs import TextCodec
from loraplex.entrypoints.http.errors import HttpError
from loraplex.entrypoints.http.requests.bodies import ChatBody
from loraplex.entrypoints.http.tools.detection import find_parser
from loraplex.entrypoints.http.tools.forced_calls import NamedCallParser, RequiredCallsParser
from loraplex.entrypoints.http.tools.parsers import PARSERS, ToolParser

MAX_TOOLS = 128
MAX_FORCED_CALLS = 16  # of one answer

logger = logging.getLogger("loraplex.http")


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The way in which the answers to a chat request are read.

    Attributes:
        make_parser: makes the parser of one answer; None: calls are not looked for.
        schema: JSON schema that forces the answer to be calls; None: it is free.
    """

    make_parser: Callable[[], ToolParser] | None = None
    schema: dict[str, Any] | None = None


class ToolFormats:
    """The format in which the served model writes calls; "" if its template shows none."""

    def __init__(self, codec: TextCodec | None) -> None:
        self._name = find_parser(codec.chat_template if codec is not None else None)
        self._has_warned = False

    def use_of(self, body: ChatBody) -> ToolUse:
        """Returns how the answers to a request are read.

        Raises:
            HttpError: `tools` or `tool_choice` is malformed.
        """
        check_tools(body.tools)
        choice, tools = body.tool_choice, body.tools or []
        if choice not in (None, "none", "auto"):
            return _forced(choice, tools, allows_many=body.parallel_tool_calls is not False)
        if not tools or choice == "none":
            return ToolUse()
        if not self._name and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the chat template shows no known form of tool calls, so calls that the model "
                "writes are passed on as text"
            )
        return ToolUse(PARSERS.get(self._name))


def _forced(choice: Any, tools: list[dict[str, Any]], *, allows_many: bool) -> ToolUse:
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    if not functions:
        raise HttpError(400, "tool_choice needs tools", param="tool_choice")
    if choice == "required":
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": name}, "parameters": _parameters(function)},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
            for name, function in functions.items()
        ]
        most = MAX_FORCED_CALLS if allows_many else 1
        schema = {"type": "array", "minItems": 1, "maxItems": most, "items": {"anyOf": calls}}
        return ToolUse(RequiredCallsParser, schema)
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or name not in functions:
        raise HttpError(
            400,
            'tool_choice must be "none", "auto", "required", or a function of tools by its name',
            param="tool_choice",
        )
    return ToolUse(partial(NamedCallParser, name), _parameters(functions[name]))


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters")
    return parameters if isinstance(parameters, dict) and parameters else {"type": "object"}


def check_tools(tools: list[dict[str, Any]] | None) -> None:
    """Raises HttpError unless each tool is a named function."""
    if tools is None:
        return
    if len(tools) > MAX_TOOLS:
        raise HttpError(400, f"tools must have at most {MAX_TOOLS} entries", param="tools")
    for index, tool in enumerate(tools):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict):
            raise HttpError(
                400, f"tools[{index}] must be a function: type and function", param="tools"
            )
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise HttpError(400, f"tools[{index}].function needs a name", param="tools")
