"""Parts of an adapter's folder that are not used are named."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from loraplex.engine.config import ModelConfig
from loraplex.engine.worker.adapters.adapter_warnings import AdapterWarnings

from helpers.models.hf_models import make_tokenizer

BASE = "org/Tiny-Llama-1B"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_tokenizer(tmp_path / "models--org--tiny-llama-1b" / "snapshots" / "12ab")
    return tmp_path / "models--org--tiny-llama-1b" / "snapshots" / "12ab"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tokenizer(tmp_path / "adapter")
    write(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=BASE)
    return tmp_path / "adapter"


def write(path: Path, **values: Any) -> None:
    plain = {"peft_type": "LORA", "target_modules": ["q_proj"]}
    old = json.loads(path.read_text()) if path.is_file() else plain
    path.write_text(json.dumps({**old, **values}))


def test_an_adapter_like_its_base_gives_no_warning(base: Path, folder: Path) -> None:
    assert AdapterWarnings(ModelConfig(), base)(folder) == []
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (folder / name).unlink()
    assert AdapterWarnings(ModelConfig(), base)(folder) == []


@pytest.mark.parametrize(
    ("file", "values", "text"),
    [
        ("adapter_config", {"base_model_name_or_path": "org/Other-7B"}, "was trained on org/Other"),
        ("adapter_config", {"brand_new": 1, "off": None}, "config are ignored: brand_new"),
        ("tokenizer_config", {"chat_template": "{{ 1 }}"}, "chat template is not used"),
        ("tokenizer_config", {"eos_token": "<|im_end|>"}, "its end token '<|im_end|>' is not"),
    ],
)
def test_what_is_not_used_is_named(
    base: Path, folder: Path, file: str, values: dict[str, Any], text: str
) -> None:
    write(folder / f"{file}.json", **values)
    (warning,) = AdapterWarnings(ModelConfig(), base)(folder)
    assert text in warning


def test_the_engines_own_template_counts_as_the_bases(base: Path, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ 'mine' }}")
    assert len(AdapterWarnings(ModelConfig(), base)(folder)) == 1
    assert AdapterWarnings(ModelConfig(chat_template="{{ 'mine' }}"), base)(folder) == []


def test_damaged_files_beside_an_adapter_do_no_harm(base: Path, folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[")
    assert AdapterWarnings(ModelConfig(), base)(folder) == []
    (folder / "tokenizer_config.json").write_text(" " * (5 << 20))
    (warning,) = AdapterWarnings(ModelConfig(), base)(folder)
    assert "too large" in warning
    assert AdapterWarnings(ModelConfig(), base)(folder / "nowhere") == []


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/x.jinja"])
def test_a_pipe_beside_an_adapter_holds_up_nothing(base: Path, folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    os.mkfifo(folder / name)
    found: list[list[str]] = []
    look = threading.Thread(
        target=lambda: found.append(AdapterWarnings(ModelConfig(), base)(folder)), daemon=True
    )
    look.start()
    look.join(30)
    assert found == [[]]


def test_a_link_out_of_the_root_is_not_read(base: Path, folder: Path) -> None:
    (folder.parent / "secret").write_text("{{ 1 }}")
    (folder / "chat_template.jinja").symlink_to("../secret")
    warnings = AdapterWarnings(ModelConfig(), base)
    assert len(warnings(folder)) == 1
    assert warnings(folder, str(folder)) == []
