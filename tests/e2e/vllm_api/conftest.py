"""One tiny model with two adapters for all tests of this folder."""

from pathlib import Path

import pytest

from helpers.running.http_server import make_models


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `base`, and the adapters `a` and `b`."""
    root = tmp_path_factory.mktemp("vllm_api")
    make_models(root)
    return root


@pytest.fixture(scope="session")
def flags(models: Path) -> list[str]:
    """Flags of vLLM that start the model quickly; of both spellings."""
    return [
        "--model", str(models / "base"), "--max_model_len=512", "--num-gpu-blocks-override", "300",
        "--enforce-eager", "--max-num-seqs", "16", "--dtype", "float",
    ]  # fmt: skip
