"""docs/reference/python.md names every public class, method and argument."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

import loraplex
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.engine.processes.engine import Engine
from loraplex.entrypoints.client.outputs import CompletionOutput, RequestOutput

PAGE = (Path(__file__).parents[3] / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
CODE = re.findall(r"^```.*?^```|`[^`\n]+`", PAGE, re.DOTALL | re.MULTILINE)
WORDS = set(re.findall(r"\w+", " ".join(CODE)))
CLASSES = [
    loraplex.LLM,
    loraplex.Client,
    loraplex.AsyncClient,
    loraplex.LoRARequest,
    loraplex.Cluster,
    Engine,
]


def _members(cls: type) -> Iterator[tuple[str, object]]:
    for name, member in vars(cls).items():
        if not name.startswith("_") or name == "__init__":
            yield name, member


@pytest.mark.parametrize("name", loraplex.__all__)
def test_every_public_name_is_on_the_page(name: str) -> None:
    assert name in WORDS


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_method_and_argument_is_on_the_page(cls: type) -> None:
    for name, member in _members(cls):
        assert name == "__init__" or name in WORDS, f"{cls.__name__}.{name}"
        function = inspect.unwrap(getattr(member, "__func__", member))
        if not inspect.isfunction(function):
            continue
        for argument in set(inspect.signature(function).parameters) - {"self", "cls"}:
            assert argument in WORDS, f"{cls.__name__}.{name}({argument})"


@pytest.mark.parametrize("cls", [SamplingParams, RequestOutput, CompletionOutput])
def test_every_field_is_on_the_page(cls: type) -> None:
    names = {field.name for field in fields(cls)}
    assert names <= WORDS, names - WORDS
