import pytest

from loraplex.engine.frontend.inputs import TextCodec

from helpers.fakes.frontend_harness import make_codec


@pytest.fixture(scope="session")
def codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    """The small tokenizer and its chat template, made once."""
    return make_codec(tmp_path_factory.mktemp("tokenizer"))
