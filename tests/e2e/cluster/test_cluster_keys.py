"""API keys in a cluster: they hold at the router's HTTP server, and limits are refused by name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraplex.engine.cluster.engine_cluster import EngineCluster
from loraplex.engine.cluster.launch.launchers import NO_RAY
from loraplex.engine.config import AdapterConfig, ServerConfig
from loraplex.engine.errors import ConfigError

from helpers.fakes.fake_engine import fake_config, make_fake_adapter
from helpers.running.key_files import bearer, write_keys
from helpers.running.processes import GUARD_S, fake_worker_command, wait_until

pytestmark = pytest.mark.e2e
PROMPT = list(range(5, 69))  # four blocks


def make_cluster(folder: Path, **tenants: Any) -> EngineCluster:
    keys = write_keys(folder / "keys.yaml", **tenants)
    server = ServerConfig(endpoint=f"ipc://{folder}/s", http="127.0.0.1:0", api_keys=str(keys))
    config = replace(fake_config(), server=server, adapter=AdapterConfig(adapter_root=str(folder)))
    return EngineCluster(
        config,
        num_engines=1,
        worker_command=fake_worker_command(),
        ray_address=NO_RAY,
    )


@pytest.mark.parametrize("entry", [{"weight": 2}, {"limits": {"requests_per_minute": 1}}])
def test_limits_and_weights_are_refused_by_name(tmp_path: Path, entry: dict[str, Any]) -> None:
    cluster = make_cluster(tmp_path, ann={}, ben=entry)
    with pytest.raises(ConfigError, match=r"tenants\.ben has a weight or limits"):
        cluster.start(GUARD_S)


def test_keys_hold(tmp_path: Path) -> None:
    make_fake_adapter(tmp_path / "red", "red")
    with make_cluster(tmp_path, ann={}, ben={}) as cluster:
        cluster.start(GUARD_S)
        base = f"http://{cluster.http_endpoint}"

        def post(path: str, key: str, **body: Any) -> httpx.Response:
            return httpx.post(base + path, json=body, headers=bearer(key), timeout=GUARD_S)

        def num_cached(key: str) -> int:
            answer = post("/v1/completions", key, prompt=PROMPT, max_tokens=1, model="x")
            return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

        assert httpx.post(f"{base}/v1/completions", json={"prompt": [1]}).status_code == 401
        load = {"lora_name": "x", "lora_path": "red"}
        assert post("/v1/load_lora_adapter", "ann", **load).status_code == 200
        assert post("/v1/unload_lora_adapter", "ben", lora_name="x").status_code == 403
        assert [num_cached(key) for key in ("ann", "ann", "ben")] == [0, 48, 0]
        write_keys(tmp_path / "keys.yaml", ben={}, cid={})
        cluster.reload_keys()
        wait_until(lambda: post("/tokenize", "cid", prompt="x").status_code != 401)
        assert post("/v1/completions", "ann", prompt=[1]).status_code == 401
        assert num_cached("ben") == 48
