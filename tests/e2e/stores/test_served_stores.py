"""Real adapters from a real S3 server, through the processes of a real engine: HTTP and ZeroMQ."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest

from loraplex import SamplingParams
from loraplex.engine.errors import AdapterError
from loraplex.engine.processes.engine import Engine
from loraplex.engine.store_config import StoreConfig

from helpers.running.http_server import ADAPTERS, Served, http_config, make_models
from helpers.scheduling.metric_scrapes import parse, value
from helpers.stores.s3_server import BUCKET, ENVIRONMENT, S3Server

pytestmark = pytest.mark.e2e
GREEDY = SamplingParams(max_tokens=8, temperature=0.0)


@pytest.fixture(scope="module")
def served(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("served")
    make_models(root)
    for name in ADAPTERS:
        s3.put_folder(f"served/stored-{name}", root / name)
    put_wrong_adapters(s3, root / "a")
    config = replace(
        http_config(root),
        store=StoreConfig(
            adapter_stores=(f"s3://{BUCKET}/served",), adapter_cache_dir=str(root / "cache")
        ),
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": s3.url}.items():
            patch.setenv(name, value)
        with Engine(config) as engine:
            engine.start()
            yield Served(engine, root)


def put_wrong_adapters(s3: S3Server, good: Path) -> None:
    """Writes what goes wrong in buckets: a cut file, a page of an error, an adapter of another
    model."""
    config = (good / "adapter_config.json").read_bytes()
    weights = (good / "adapter_model.safetensors").read_bytes()
    s3.put_adapter("served/cut", config.decode(), weights=weights[: len(weights) // 2])
    s3.put_adapter("served/page", "<html>404 Not Found</html>", weights=weights)
    s3.put_adapter("served/rank", json.dumps({**json.loads(config), "r": 7}), weights=weights)


def test_it_answers_as_the_same_adapter_by_path(served: Served) -> None:
    api = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    with served.zmq() as client:
        for name in ADAPTERS:
            texts = set()
            for model in (name, f"stored-{name}"):
                answer = api.completions.create(model=model, prompt="Once", temperature=0)
                (output,) = client.generate("Once", GREEDY, adapter=model, stream=False)
                texts.add((answer.choices[0].text, tuple(output.outputs[0].token_ids)))
            assert len(texts) == 1
    models = {model.id for model in api.models.list()}
    assert {f"stored-{name}" for name in ADAPTERS} <= models


@pytest.mark.parametrize(
    ("name", "cause"),
    [("cut", "safetensors"), ("page", "adapter_config.json"), ("rank", "rank")],
)
def test_a_wrong_file_is_refused_by_name_with_the_cause(
    served: Served, name: str, cause: str
) -> None:
    with served.zmq() as client:
        for _ in range(2):
            with pytest.raises(AdapterError, match=f"(?s){name}.*{cause}"):
                list(client.generate("Once", GREEDY, adapter=name))
        (output,) = client.generate("Once", GREEDY, adapter="stored-a", stream=False)
        assert output.finished


def test_metrics_count_the_downloads(served: Served) -> None:
    with served.zmq() as client:
        (output,) = client.generate("Once", GREEDY, adapter="stored-b", stream=False)
        assert output.finished
    text = httpx.get(f"{served.url}/metrics", timeout=60).text
    found = parse(text)
    assert value(found, "loraplex_store_lookups_total", result="found") >= 1
    assert value(found, "loraplex_store_download_seconds_count") >= 1
    num_bytes = value(found, "loraplex_store_download_bytes_total")
    assert num_bytes >= value(found, "loraplex_store_cache_bytes", kind="used") > 0
    assert value(found, "loraplex_store_download_failures_total") == 0


def test_http_says_404_for_a_name_that_no_store_has(served: Served) -> None:
    api = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        api.completions.create(model="nobody", prompt="Once")
