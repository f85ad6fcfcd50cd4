"""Finds the calls of one answer and gives them OpenAI's shape."""

import secrets
from typing import Any

from loraplex.entrypoints.http.tools.parsers import ToolParser
from loraplex.entrypoints.http.tools.tool_call import Part, ToolCall


class CallFinder:
    """Finds the calls of one choice and numbers them."""

    def __init__(self, parser: ToolParser, *, allows_many: bool) -> None:
        """Without `allows_many` all calls after the first are dropped."""
        self._parser = parser
        self._allows_many = allows_many
        self._num_calls = 0
        self._num_shown = 0

    def take(self, entry: dict[str, Any]) -> list[Part]:
        """Returns the parts that an entry of "outputs" completes."""
        parts = self._parser.feed(entry["text"])
        if entry["finish_reason"]:
            parts += self._parser.finish()
        return [part for part in parts if isinstance(part, str) or self._counts(part)]

    def _counts(self, call: ToolCall) -> bool:
        self._num_calls += 1
        return self._allows_many or self._num_calls == 1

    def as_json(self, call: ToolCall) -> dict[str, Any]:
        """Returns the call in OpenAI's shape, with the index that a stream needs."""
        index, self._num_shown = self._num_shown, self._num_shown + 1
        function = {"name": call.name, "arguments": call.arguments}
        call_id = secrets.token_hex(5)[:9]  # nine characters, as Mistral's templates want
        return {"index": index, "id": call_id, "type": "function", "function": function}

    def reason(self, entry: dict[str, Any]) -> str | None:
        """Returns why the choice ended: for its calls, if it ended by itself."""
        reason: str | None = entry["finish_reason"]
        return "tool_calls" if reason == "stop" and self._num_calls else reason
