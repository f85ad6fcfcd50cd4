"""Compiles the grammars on its standard input, one a line: see GrammarChecker."""

import resource
import sys

import msgspec
from llguidance import LLMatcher

from loraplex.engine.grammar.checker import Checked
from loraplex.engine.grammar.matcher import describe_error
from loraplex.engine.grammar.source import parser_limits, to_library
from loraplex.scheduler.frontend_protocol import GrammarSpec

MAX_BYTES = 4 << 30
"""Largest address space of the child. A library that runs out of memory aborts the process."""


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    _write(b"ready")
    for line in sys.stdin.buffer:
        _write(msgspec.json.encode(check(msgspec.json.decode(line, type=GrammarSpec))))


def check(spec: GrammarSpec) -> Checked:
    """Returns the grammar as the library takes it, or the error."""
    try:
        grammar = to_library(spec)
        error = LLMatcher.validate_grammar(grammar, None, limits=parser_limits())
    except Exception as problem:  # the library's readers raise classes of their own
        return Checked(error=describe_error(f"the grammar cannot be read: {problem}"))
    if error and not error.startswith("WARNING"):
        return Checked(error=describe_error(f"the grammar cannot be compiled: {error}"))
    return Checked(grammar)


def _write(line: bytes) -> None:
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
