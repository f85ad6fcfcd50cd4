"""Reads answers whose form the request has forced to be calls."""

from loraplex.entrypoints.http.tools.tool_call import Part, ToolCall, call_from, read_json


class RequiredCallsParser:
    """[{"name": ..., "parameters": {...}}, ...]. An answer that was cut off is text."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str) -> list[Part]:
        self._held += text
        return []

    def finish(self) -> list[Part]:
        found = read_json(self._held, 0)
        values = found[0] if found and isinstance(found[0], list) else []
        calls = [call for value in values if (call := call_from(value))]
        if calls and len(calls) == len(values):
            return [*calls]
        return [self._held] if self._held else []


class NamedCallParser:
    """The arguments of one function, an object. An answer that was cut off is text."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._held = ""

    def feed(self, text: str) -> list[Part]:
        self._held += text
        return []

    def finish(self) -> list[Part]:
        found = read_json(self._held, 0)
        if found and isinstance(found[0], dict):
            return [ToolCall(self._name, self._held)]
        return [self._held] if self._held else []
