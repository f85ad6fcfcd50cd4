"""Turns the grammars of requests into those of the grammar library."""

from typing import Any

from llguidance import LLMatcher, LLParserLimits
from llguidance.gbnf_to_lark import any_to_lark

from loraplex.scheduler.frontend_protocol import GrammarSpec


def parser_limits() -> LLParserLimits:
    """Returns limits under which a mask takes at most some 10 ms and a grammar some 20 MB."""
    return LLParserLimits(
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=10_000,
        max_grammar_size=50_000,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )


def to_library(spec: GrammarSpec) -> str:
    """Returns the grammar as llguidance takes it. It is not compiled yet.

    Raises:
        ValueError: it cannot be read.
    """
    match spec.kind:
        case "json":
            options: Any = {}
            if spec.whitespace:
                options["whitespace_pattern"] = spec.whitespace
            elif spec.is_compact:
                options["whitespace_flexible"] = False
            return LLMatcher.grammar_from_json_schema(spec.text, overrides=options)
        case "regex":
            return LLMatcher.grammar_from_regex(spec.text)
        case "gbnf":
            return LLMatcher.grammar_from_lark(any_to_lark(spec.text))
        case "lark":
            return LLMatcher.grammar_from_lark(spec.text)
    raise ValueError(f"unknown kind of grammar {spec.kind!r}")
