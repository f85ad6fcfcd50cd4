"""Patterns of PEFT configurations: the limits, and the same answers as Python's own matcher."""

import re

import pytest

from loraplex.engine.adapters.peft_config import PeftConfigError, parse_peft_config
from loraplex.engine.adapters.peft_patterns import (
    MAX_PATTERN_CHARS,
    MAX_PATTERNS,
    MAX_TOTAL_CHARS,
    PatternCompiler,
    PatternError,
)

NAMES = [
    f"model.layers.{layer}.{module}"
    for layer in (0, 1, 10, 31)
    for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
]
KEY = r"(.*\.)?({})$"
PATTERNS = [
    "q_proj", "q_proj|k_proj", r".*\.(q|v)_proj", r"model\.layers\.(1|10)\..*",
    r".*\.[0-9]\..*up_proj", r"(?:[^.]+\.)*down_proj", r".*layers\.\d{2}\..*", r"(?P<any>.*)_proj",
    r"(?i:MODEL).*", "(a+)+b",
    "(?:.?.?)*_proj", "model.layers.1.mlp.up_proj", "", "x*",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_matches_what_python_matches(pattern: str) -> None:
    whole = PatternCompiler().compile("target_modules", pattern)
    key = PatternCompiler().compile("rank_pattern", pattern, KEY)
    for name in NAMES:
        assert (whole.fullmatch(name) is None) == (re.fullmatch(pattern, name) is None)
        python = re.match(KEY.replace("{}", pattern), name)
        assert (key.match(name) is None) == (python is None)


@pytest.mark.parametrize("name", ["a" * 5000, "model.layers.0.self_attn.q_proj" * 50])
@pytest.mark.parametrize("pattern", ["(?:.?.?)*!", "(a+)+b", "(a|a)*b", ".*a" * 9 + "!"])
def test_patterns_that_backtrack_for_ever_are_answered(pattern: str, name: str) -> None:
    compiled = PatternCompiler().compile("target_modules", pattern)
    assert compiled.fullmatch(name) is None and compiled.match(name) is None


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(?=q)q_proj", r"\(\?= \(lookaround"), ("(?<!k)_proj", "lookaround"),
        (r"(q|k)\1", "backreferences"), ("(?P<x>q)(?P=x)", "backreferences"),
        ("(q", "missing"), ("q)|(k", "unexpected"), ("*q", "no argument"),
        ("q{1001}", "repetition"), ("((a{90}){90}){90}", "repetition"), ("\udc80", "utf-8"),
        (7, "must be text"),
        ("a" * (MAX_PATTERN_CHARS + 1), "longer than"),
    ],
    ids=lambda value: str(value)[:20].encode("unicode_escape").decode(),
)  # fmt: skip
def test_refusals_name_the_field_and_the_reason(pattern: object, reason: str) -> None:
    with pytest.raises(PatternError, match=f"^rank_pattern: .*{reason}"):
        PatternCompiler().compile("rank_pattern", pattern, KEY)


def test_a_configuration_holds_a_bounded_number_of_patterns() -> None:
    values = {"peft_type": "LORA", "target_modules": ["q_proj"]}
    keys = {f"x{i}": 4 for i in range(MAX_PATTERNS)}
    with pytest.raises(PeftConfigError, match=f"more than {MAX_PATTERNS} patterns"):
        parse_peft_config({**values, "rank_pattern": keys})
    long = {f"{i:04}" + "a" * (MAX_PATTERN_CHARS - 4): 4 for i in range(40)}
    with pytest.raises(PeftConfigError, match=f"{MAX_TOTAL_CHARS} characters"):
        parse_peft_config({**values, "alpha_pattern": long})
    half = dict(list(keys.items())[: MAX_PATTERNS // 2 - 1])
    assert parse_peft_config({**values, "rank_pattern": half, "alpha_pattern": half}).rank == 8
