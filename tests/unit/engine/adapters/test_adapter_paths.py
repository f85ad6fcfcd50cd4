from pathlib import Path

import pytest

from loraplex.engine.adapters.paths import adapters_at_start
from loraplex.engine.config import AdapterConfig
from loraplex.engine.errors import ConfigError


def peft(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text("{}")
    return path


def test_named_adapters_and_a_folder_of_them(tmp_path: Path) -> None:
    single = peft(tmp_path / "single")
    for name in ("b", "a"):
        peft(tmp_path / "many" / name)
    (tmp_path / "many" / "notes").mkdir()
    config = AdapterConfig(
        adapters=(("mine", str(single)), ("again", str(single))), adapter_dir=str(tmp_path / "many")
    )
    assert adapters_at_start(config) == [
        ("mine", str(single)), ("again", str(single)),
        ("a", str(tmp_path / "many" / "a")), ("b", str(tmp_path / "many" / "b")),
    ]  # fmt: skip
    assert adapters_at_start(AdapterConfig()) == []


def test_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft(tmp_path / "single")
    monkeypatch.chdir(tmp_path)
    assert adapters_at_start(AdapterConfig(adapters=(("x", "single"),))) == [
        ("x", str(tmp_path / "single"))
    ]


def test_the_same_adapter_twice_is_one(tmp_path: Path) -> None:
    path = str(peft(tmp_path / "many" / "a"))
    config = AdapterConfig(adapters=(("a", path),), adapter_dir=str(tmp_path / "many"))
    assert adapters_at_start(config) == [("a", path)]


def test_a_folder_of_the_wrong_kind_says_what_to_give(tmp_path: Path) -> None:
    """Otherwise the server starts without the adapter, and only the base model answers."""
    mine, empty, model = peft(tmp_path / "all" / "mine"), tmp_path / "empty", tmp_path / "model"
    for folder in (empty / "notes", model):
        folder.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    for option, path, text in [
        ("adapter_dir", mine, f"is an adapter itself: give it as --adapter mine={mine}"),
        ("adapter_dir", empty, "holds no folder with an adapter_config.json: name the folder"),
        ("adapters", tmp_path / "all", "folder of adapters: give it as --adapter-dir"),
        ("adapters", model, "a whole model: give it as --model"),
    ]:
        value = str(path) if option == "adapter_dir" else (("x", str(path)),)
        with pytest.raises(ConfigError, match=text):
            adapters_at_start(AdapterConfig(**{option: value}))


def test_what_cannot_be_is_refused_at_once(tmp_path: Path) -> None:
    good = str(peft(tmp_path / "good"))
    (tmp_path / "empty").mkdir()
    other = str(peft(tmp_path / "other"))
    for adapters, text in [
        ((("x", str(tmp_path / "missing")),), "'x'.*missing is no directory"),
        ((("x", str(tmp_path / "empty")),), "holds no adapter_config.json"),
        ((("x", good), ("x", other)), "given twice"),
        ((("a b", good),), "adapter name 'a b'"),
    ]:
        with pytest.raises(ConfigError, match=text):
            adapters_at_start(AdapterConfig(adapters=adapters))
    with pytest.raises(ConfigError, match="adapter_dir .*nowhere is no directory"):
        adapters_at_start(AdapterConfig(adapter_dir=str(tmp_path / "nowhere")))
