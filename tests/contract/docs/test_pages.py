"""The pages of docs/, README.md and CONTRIBUTING.md: links resolve, named files exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
LINK = re.compile(r"\]\(([^()\s]+)\)")
CODE_BLOCK = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
SOURCE_FILE = re.compile(
    r"`((?:engine|backends|memory|scheduler|entrypoints|benchmarks|tests|examples|docs)"
    r"/[\w./-]+\.(?:py|cu|h|md|jsonl|svg))`"
)


def _anchors(page: Path) -> set[str]:
    """Returns the heading anchors of a page, made as GitHub makes them."""
    text = CODE_BLOCK.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_relative_links_resolve(page: Path) -> None:
    text = CODE_BLOCK.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{_name(page)} links to {link}, which does not exist"
        if anchor:
            assert anchor in _anchors(target), f"{_name(page)}: {link} names no heading"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_source_files_named_exist(page: Path) -> None:
    for path in SOURCE_FILE.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), f"{_name(page)} names {path}, which does not exist"


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {
        (index.parent / link.partition("#")[0]).resolve()
        for link in LINK.findall(index.read_text(encoding="utf-8"))
    }
    pages = set((ROOT / "docs").rglob("*.md")) - {index}
    assert pages <= linked, sorted(map(_name, pages - linked))
