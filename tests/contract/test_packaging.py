"""The package list is complete, and each module has one name."""

import ast
import importlib
import importlib.util
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
TOP = {name: ROOT / folder for name, folder in SETUPTOOLS["package-dir"].items()}


def packages_on_disk() -> set[str]:
    found = set()
    for name, folder in TOP.items():
        for init in folder.rglob("__init__.py"):
            found.add(".".join([name, *init.parent.relative_to(folder).parts]))
    # entrypoints/root is mapped to `loraplex` itself.
    return {name for name in found if not name.startswith("loraplex.entrypoints.root")}


def test_package_list_equals_the_folders() -> None:
    assert set(SETUPTOOLS["packages"]) == packages_on_disk()


def test_every_folder_with_code_is_a_package() -> None:
    for folder in TOP.values():
        for file in folder.rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), file


@pytest.mark.parametrize("name", ["engine", "backends", "memory", "scheduler", "entrypoints"])
def test_no_module_has_a_second_name(name: str) -> None:
    assert importlib.util.find_spec(name) is None
    assert importlib.util.find_spec(f"loraplex.{name}") is not None


def test_init_files_below_the_root_are_empty() -> None:
    for name, folder in TOP.items():
        for init in folder.rglob("__init__.py"):
            if name != "loraplex" and "root" not in init.relative_to(folder).parts:
                assert not init.read_text().strip(), init


def test_version_is_one() -> None:
    import loraplex

    assert loraplex.__version__ == PROJECT["project"]["version"] == version("loraplex")


def test_test_files_are_unique_and_no_package() -> None:
    files = [f for f in (ROOT / "tests").rglob("*.py") if f.name.startswith("test_")]
    names = [f.name for f in files]
    assert sorted(names) == sorted(set(names))
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_every_test_file_is_collected_by_its_name() -> None:
    for file in (ROOT / "tests").rglob("*.py"):
        in_helpers = "helpers" in file.relative_to(ROOT / "tests").parts
        is_support = in_helpers or file.name == "conftest.py"
        assert is_support or file.name.startswith("test_"), f"{file} is never collected"


def test_type_checkers_see_the_public_names() -> None:
    """They look for py.typed in the top package and do not see its __getattr__."""
    import loraplex

    root = TOP["loraplex"]
    assert (root / "py.typed").exists()
    tree = ast.parse((root / "__init__.py").read_text())
    typed, _ = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {
        (f"{node.module}", alias.name): alias.asname
        for node in typed.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {asname for asname in imported.values()} == set(loraplex.__all__) - {"__version__"}
    for (module, name), asname in imported.items():
        assert asname == name
        assert getattr(loraplex, name) is getattr(importlib.import_module(module), name)
