"""Finds function calls in the text of an answer, as it comes.

The formats are those of the models' own templates. A call is passed on when it is whole, so what is
broken can be passed on as text: no character is lost, however the text is cut.
"""

import re
from abc import ABC, abstractmethod
from typing import Protocol

from loraplex.entrypoints.http.tools.tool_call import (
    MAX_CALLS,
    Part,
    ToolCall,
    call_from,
    read_json,
    skip_space,
)


class ToolParser(Protocol):
    """Reads one answer."""

    def feed(self, text: str) -> list[Part]:
        """Takes the next text; returns the parts that are certain now."""
        ...

    def finish(self) -> list[Part]:
        """Returns the rest at the end of the answer."""
        ...


class _Output:
    """Collects parts. White space next to a call is dropped, as it only sets calls apart."""

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._space = ""  # the end of the text so far, which a call may follow
        self._is_after_call = False

    def text(self, text: str) -> None:
        text = self._space + text
        if self._is_after_call:
            text = text.lstrip()
        body = text.rstrip()
        self._space = text[len(body) :]
        if body:
            self._is_after_call = False
            self._parts.append(body)

    def call(self, call: ToolCall) -> None:
        self._space, self._is_after_call = "", True
        self._parts.append(call)

    def take(self, *, at_end: bool = False) -> list[Part]:
        if at_end and self._space:
            self._parts.append(self._space)
        parts, self._parts = self._parts, []
        return parts


class HermesParser:
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>, text before and between.

    Hermes and Qwen write it. The end of the answer may stand for the last closing mark.
    """

    _OPEN, _CLOSE = "<tool_call>", "</tool_call>"

    def __init__(self) -> None:
        self._output = _Output()
        self._held = ""
        self._in_call = False

    def feed(self, text: str) -> list[Part]:
        self._held += text
        while True:
            mark = self._CLOSE if self._in_call else self._OPEN
            at = self._held.find(mark)
            if at < 0:
                break
            before, self._held = self._held[:at], self._held[at + len(mark) :]
            if self._in_call:
                self._end_call(before, self._CLOSE)
            else:
                self._output.text(before)
            self._in_call = not self._in_call
        if not self._in_call:
            cut = len(self._held) - _overlap(self._held, self._OPEN)
            self._output.text(self._held[:cut])
            self._held = self._held[cut:]
        return self._output.take()

    def finish(self) -> list[Part]:
        if self._in_call:
            self._end_call(self._held, "")
        else:
            self._output.text(self._held)
        self._held, self._in_call = "", False
        return self._output.take(at_end=True)

    def _end_call(self, text: str, close: str) -> None:
        found = read_json(text, skip_space(text, 0))
        call = call_from(found[0]) if found and not text[found[1] :].strip() else None
        if call is None:
            self._output.text(f"{self._OPEN}{text}{close}")
        else:
            self._output.call(call)


class _WholeAnswerParser(ABC):
    """Holds an answer back once a mark of calls has come, and reads that part at its end."""

    MARK = ""
    BARE = ""
    """Character that begins calls without the mark, at the begin of an answer."""

    def __init__(self) -> None:
        self._output = _Output()
        self._held = ""
        self._is_calls = False
        self._may_be_bare = bool(self.BARE)

    def feed(self, text: str) -> list[Part]:
        self._held += text
        if self._may_be_bare and (first := self._held.lstrip()):
            self._is_calls, self._may_be_bare = first[0] == self.BARE, False
        if self._is_calls or self._may_be_bare:
            return []
        at = self._held.find(self.MARK)
        self._is_calls = at >= 0
        if at < 0:
            at = len(self._held) - _overlap(self._held, self.MARK)
        self._output.text(self._held[:at])
        self._held = self._held[at:]
        return self._output.take()

    def finish(self) -> list[Part]:
        calls = self._read(self._held) if self._is_calls else None
        for call in calls or ():
            self._output.call(call)
        if not calls:
            self._output.text(self._held)
        self._held = ""
        return self._output.take(at_end=True)

    @abstractmethod
    def _read(self, text: str) -> list[ToolCall] | None:
        """Returns the calls of a text that holds nothing else; None if it holds anything else."""


class Llama3Parser(_WholeAnswerParser):
    """{"name": ..., "parameters": {...}}, several with semicolons between.

    Llama 3 writes it, with or without <|python_tag|> before it.
    """

    MARK = "<|python_tag|>"
    BARE = "{"

    def _read(self, text: str) -> list[ToolCall] | None:
        at = skip_space(text, 0)
        if text.startswith(self.MARK, at):
            at += len(self.MARK)
        return _calls_between(text, at, ";")


class MistralParser(_WholeAnswerParser):
    """[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], or [TOOL_CALLS]name{...} for each.

    The second form may have [ARGS] after the name, and [CALL_ID]id before it.
    """

    MARK = "[TOOL_CALLS]"
    _NAME = re.compile(r"\s*([^\s\[\]{}]+?)\s*(?:\[CALL_ID\][^\[\]{}]*)?(?:\[ARGS\])?\s*(?={)")

    def _read(self, text: str) -> list[ToolCall] | None:
        calls: list[ToolCall] = []
        for piece in text.split(self.MARK)[1:]:
            found = self._read_list(piece) or self._read_named(piece)
            if not found:
                return None
            calls += found
        return calls if 0 < len(calls) <= MAX_CALLS else None

    def _read_list(self, text: str) -> list[ToolCall] | None:
        found = read_json(text, skip_space(text, 0))
        if found is None or text[found[1] :].strip() or not isinstance(found[0], list):
            return None
        calls = [call_from(value) for value in found[0]]
        return [call for call in calls if call] if all(calls) else None

    def _read_named(self, text: str) -> list[ToolCall] | None:
        calls: list[ToolCall] = []
        at = 0
        while at < len(text):
            name = self._NAME.match(text, at)
            found = read_json(text, name.end()) if name else None
            call = call_from({"name": name[1], "arguments": found[0]}) if name and found else None
            if call is None or found is None:
                return None
            calls.append(call)
            at = skip_space(text, found[1])
        return calls


PARSERS: dict[str, type[ToolParser]] = {
    "hermes": HermesParser,
    "llama3_json": Llama3Parser,
    "mistral": MistralParser,
}
"""By vLLM's names."""


def _calls_between(text: str, at: int, separator: str) -> list[ToolCall] | None:
    calls: list[ToolCall] = []
    while len(calls) < MAX_CALLS:
        found = read_json(text, skip_space(text, at))
        call = call_from(found[0]) if found else None
        if found is None or call is None:
            return None
        calls.append(call)
        at = skip_space(text, found[1])
        if at == len(text):
            return calls
        if text[at] != separator:
            return None
        at += 1
    return None


def _overlap(text: str, mark: str) -> int:
    """Returns the length of the longest end of `text` that begins `mark`."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[-length:]):
            return length
    return 0
