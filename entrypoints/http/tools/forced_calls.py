"""Reads answers whose form the request has forced to be calls.

An answer is read at its end. One that was cut off is text.
"""

from abc import ABC, abstractmethod
from typing import Any

from loraplex.entrypoints.http.tools.tool_call import Part, ToolCall, call_from, read_json


class _ForcedParser(ABC):
    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str) -> list[Part]:
        self._held += text
        return []

    def finish(self) -> list[Part]:
        found = read_json(self._held, 0)
        calls = self._calls(found[0]) if found else []
        if calls:
            return [*calls]
        return [self._held] if self._held else []

    @abstractmethod
    def _calls(self, value: Any) -> list[ToolCall]:
        """Returns the calls of the answer's JSON value; none if it is of another form."""


class RequiredCallsParser(_ForcedParser):
    """[{"name": ..., "parameters": {...}}, ...]."""

    def _calls(self, value: Any) -> list[ToolCall]:
        calls = [call_from(item) for item in value] if isinstance(value, list) else []
        return [call for call in calls if call] if all(calls) else []


class NamedCallParser(_ForcedParser):
    """The arguments of one function, an object."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def _calls(self, value: Any) -> list[ToolCall]:
        return [ToolCall(self._name, self._held)] if isinstance(value, dict) else []
