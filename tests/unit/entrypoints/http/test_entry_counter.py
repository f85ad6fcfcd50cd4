"""The number of entries of a JSON text, against what a parser builds of it."""

import json
import random
from typing import Any

import pytest

from loraplex.entrypoints.http.requests.entry_counter import EntryCounter

ODD = ('"', "\\", ",", "[", "{", "]", "\n", "é", '\\"', "x")


def random_value(rng: random.Random, depth: int = 4) -> Any:
    kind = rng.randrange(4 if depth else 2)
    if kind == 0:
        return rng.choice((1, -2.5, None, True))
    if kind == 1:
        return "".join(rng.choices(ODD, k=rng.randrange(6)))
    values = [random_value(rng, depth - 1) for _ in range(rng.randrange(5))]
    return values if kind == 2 else {f"{rng.choice(ODD)}{i}": v for i, v in enumerate(values)}


def num_built(value: Any) -> int:
    """Returns one for each list and map, and one for each entry but the first."""
    if not isinstance(value, list | dict):
        return 0
    values = value if isinstance(value, list) else list(value.values())
    return 1 + max(0, len(values) - 1) + sum(map(num_built, values))


@pytest.mark.parametrize("seed", range(40))
def test_strings_hold_no_entries_however_the_text_is_cut(seed: int) -> None:
    rng = random.Random(seed)
    value = [random_value(rng) for _ in range(20)]
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode()
    counter, start = EntryCounter(), 0
    while start < len(text):
        end = start + rng.randrange(1, 30)
        counter.add(text[start:end])
        start = end
    assert counter.num_entries == num_built(value)


@pytest.mark.parametrize("text", [b'"' + b'\\",' * 300_000, b'",' * 300_000, b"\\" * 900_001])
def test_no_text_takes_more_than_its_length(text: bytes) -> None:
    """The first one took the square of its length: minutes in which no client was served."""
    counter = EntryCounter()
    counter.add(text)
    assert counter.num_entries <= len(text)
