"""The shape and the voice of the repository: sizes of files and folders, names, first words."""

import ast
import io
import re
import statistics
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("engine", "backends", "memory", "scheduler", "entrypoints")
ALL_CODE = (*PRODUCT, "tests", "examples", "benchmarks")
MAX_FILE_LINES, MAX_MEDIAN_LINES = 350, 120
MAX_FOLDER_FILES = 16
MAX_README_LINES, MAX_DOCS_COLUMNS = 150, 110
HIDES_ITS_SUBJECT = re.compile(r"(Of|What|As)\b")
MAY_HIDE_IT = re.compile(rf"[\"'#]\s*{HIDES_ITS_SUBJECT.pattern}")


def python_files(folders: tuple[str, ...]) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def num_lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_files_are_short() -> None:
    long = {name_of(f): num_lines(f) for f in python_files(ALL_CODE)}
    long = {name: lines for name, lines in long.items() if lines > MAX_FILE_LINES}
    assert not long, f"split what is above {MAX_FILE_LINES} lines: {long}"


def test_the_median_product_file_is_short() -> None:
    lines = [num_lines(file) for file in python_files(PRODUCT)]
    assert statistics.median(n for n in lines if n) <= MAX_MEDIAN_LINES


def test_folders_are_small() -> None:
    counts: dict[str, int] = defaultdict(int)
    for file in python_files(ALL_CODE):
        counts[name_of(file.parent)] += 1
    large = {folder: count for folder, count in counts.items() if count > MAX_FOLDER_FILES}
    assert not large, f"divide folders of more than {MAX_FOLDER_FILES} files: {large}"


def test_two_public_classes_never_share_a_name() -> None:
    homes = defaultdict(list)
    for file in python_files(PRODUCT):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(name_of(file))
    shared = {name: files for name, files in homes.items() if len(files) > 1}
    assert not shared, f"rename all but one: {shared}"


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yields the line and the text of every docstring."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield node.body[0].lineno, text


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Yields the line and the text of every comment; of a block of lines, only the first."""
    last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            number = token.start[0]
            if number != last + 1:
                yield number, token.string.lstrip("# ")
            last = number


def test_docstrings_and_comments_begin_with_a_verb_or_a_noun() -> None:
    found = []
    for file in python_files(ALL_CODE):
        source = file.read_text(encoding="utf-8")
        if not MAY_HIDE_IT.search(source):  # to parse every file takes ten seconds
            continue
        for line, text in (*docstrings(source), *comments(source)):
            if HIDES_ITS_SUBJECT.match(text):
                found.append(f"{name_of(file)}:{line}: {text.splitlines()[0]}")
    assert not found, "begin with a verb or with what is returned:\n" + "\n".join(found)


def wide_lines(file: Path) -> list[int]:
    """Returns the numbers of the lines that are too wide, but for code, tables and lone links."""
    wide, in_code = [], False
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        cannot_wrap = in_code or line.startswith("|") or " " not in line.strip()
        if len(line) > MAX_DOCS_COLUMNS and not cannot_wrap:
            wide.append(number)
    return wide


def test_lines_of_the_docs_wrap() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    wide = {name_of(page): lines for page in pages if (lines := wide_lines(page))}
    assert not wide, f"wrap lines wider than {MAX_DOCS_COLUMNS} columns: {wide}"


def test_readme_is_short() -> None:
    assert num_lines(ROOT / "README.md") <= MAX_README_LINES
