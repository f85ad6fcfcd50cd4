from pathlib import Path

import pytest

from loraplex.engine.checkpoint.generation_defaults import generation_defaults
from loraplex.engine.errors import ConfigError


def test_the_packaged_model_has_the_defaults_of_its_card(tmp_path: Path) -> None:
    """At temperature 1 its answers are nonsense."""
    assert generation_defaults("") == {"temperature": 0.2, "top_p": 0.9}
    assert generation_defaults(str(tmp_path / "other.gguf")) == {}
    assert generation_defaults(str(tmp_path)) == {}


def test_numbers_alone_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text('{"temperature": "hot", "top_k": 5, "max_new_tokens": 9, "min_p": NaN}')
    assert generation_defaults(str(tmp_path)) == {"top_k": 5, "max_tokens": 9}
    for text in ("[", "[]"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="generation_config.json"):
            generation_defaults(str(tmp_path))
