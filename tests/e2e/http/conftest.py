"""One engine for all tests of this folder."""

from collections.abc import Iterator

import openai
import pytest

from loraplex.engine.processes.engine import Engine

from helpers.running.http_server import Served, http_config, make_models


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("http")
    make_models(root)
    with Engine(http_config(root)) as engine:
        engine.start()
        yield Served(engine, root)


@pytest.fixture(scope="session")
def api(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
