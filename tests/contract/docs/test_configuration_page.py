"""docs/reference/configuration.md is what its generator writes."""

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[3]


def _generator() -> ModuleType:
    path = ROOT / "docs" / "generate_configuration.py"
    spec = importlib.util.spec_from_file_location("generate_configuration", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_up_to_date() -> None:
    generator = _generator()
    found = generator.PAGE.read_text(encoding="utf-8")
    assert found == generator.page(), (
        f"docs/reference/configuration.md is stale; regenerate it: {generator.COMMAND}"
    )


def test_page_shows_every_flag_of_serve() -> None:
    """The flags come from the parser, the page from the dataclasses: each is on the page once."""
    generator = _generator()
    parser = generator.flags.FlagParser(usage="")
    generator.flags.add_engine_flags(parser, offline=False)
    words = parser.format_help().replace(",", " ").split()
    shown = {word for word in words if word.startswith("--") and word[2:3].isalpha()}
    page = generator.page()
    missing = [
        flag
        for flag in shown
        if flag != "--help" and page.count(f"| `{flag}` |") != 1 and not _is_negation(flag, shown)
    ]
    assert not missing


def _is_negation(flag: str, shown: set[str]) -> bool:
    return flag.startswith("--no-") and "--" + flag.removeprefix("--no-") in shown
