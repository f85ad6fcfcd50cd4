"""docs/reference/protocol.md names every message, key and code of the protocol."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from loraplex.engine.frontend import protocol
from loraplex.engine.frontend.sampling_params import SamplingParams

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "reference" / "protocol.md").read_text(encoding="utf-8")
QUOTED = set(re.findall(r"`([a-z_]+)`", PAGE))


@pytest.mark.parametrize("kind", protocol.CLIENT_MESSAGES)
def test_every_message_and_key_is_on_the_page(kind: str) -> None:
    assert kind in QUOTED
    for field in fields(protocol.CLIENT_MESSAGES[kind]):
        assert field.name in QUOTED, f"{kind}.{field.name}"


def test_every_sampling_parameter_is_on_the_page() -> None:
    assert {field.name for field in fields(SamplingParams)} <= QUOTED


def test_every_error_code_is_on_the_page() -> None:
    codes = set()
    for folder in ("engine", "scheduler"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            codes |= set(re.findall(r'(?:client_error|RequestRefused)\(\s*"([a-z_]+)"', text))
    assert {"malformed", "prompt_too_long", "queue_full"} <= codes
    assert codes <= QUOTED, codes - QUOTED
