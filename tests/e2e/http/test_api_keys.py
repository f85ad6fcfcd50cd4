"""API keys and tenants over HTTP, before an engine of real processes with two HTTP servers."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraplex import AsyncClient
from loraplex.engine.config import AdapterConfig, ServerConfig
from loraplex.engine.errors import ConfigError
from loraplex.engine.processes.engine import Engine

from helpers.fakes.fake_engine import expected_tokens, fake_config, make_fake_adapter
from helpers.running.key_files import bearer, write_keys
from helpers.running.processes import GUARD_S, running_engine, wait_until

pytestmark = pytest.mark.e2e
PROMPT = list(range(5, 69))  # four blocks
NUM_CLIENTS = 50
FREE: dict[str, Any] = {name: {} for name in ("ann", "ben")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys")
    make_fake_adapter(path / "adapters" / "red", "red")
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    keys = write_keys(folder / "keys.yaml", **FREE, admin={})
    server = ServerConfig(endpoint="", http="127.0.0.1:0", num_frontends=2, api_keys=str(keys))
    config = fake_config(adapter=AdapterConfig(adapter_root=str(folder / "adapters")))
    with running_engine(replace(config, server=server), "--delay", "0.01") as engine:
        yield engine


def post(engine: Engine, path: str, key: str, **body: Any) -> httpx.Response:
    url = f"http://{engine.http_endpoint}{path}"
    return httpx.post(url, json=body, headers=bearer(key), timeout=GUARD_S)


def complete(engine: Engine, key: str, **body: Any) -> httpx.Response:
    values = {"prompt": PROMPT, "max_tokens": 2, "return_token_ids": True, **body}
    return post(engine, "/v1/completions", key, **values)


def reload(engine: Engine, folder: Path, **tenants: Any) -> None:
    """Gives every HTTP server and the scheduler these tenants, and one more to see when."""
    marker = f"marker-{time.monotonic_ns()}"
    write_keys(folder / "keys.yaml", **tenants, admin={"keys": ["admin", marker]})
    engine.reload_keys()
    seen: Counter[str] = Counter()

    def knows() -> bool:
        with httpx.Client(timeout=GUARD_S) as client:
            base = f"http://{engine.http_endpoint}"
            response = client.get(f"{base}/v1/models", headers=bearer(marker))
            seen[client.get(f"{base}/health").json()["instance"]] += response.status_code == 200
        return len(+seen) == 2

    wait_until(knows)


def test_two_tenants_share_no_prefix_blocks(engine: Engine) -> None:
    def num_cached(key: str, **body: Any) -> int:
        usage = complete(engine, key, **body).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert [num_cached("ann"), num_cached("ann")] == [0, 48]
    assert [num_cached("ben"), num_cached("admin"), num_cached("ben")] == [0, 0, 48]
    assert num_cached("ben", cache_salt="s") == 0  # a salt divides further, within the tenant


def test_an_adapter_is_its_loaders(engine: Engine) -> None:
    name = {"lora_name": "mine"}
    assert post(engine, "/v1/load_lora_adapter", "ann", **name, lora_path="red").status_code == 200
    for path in ("/v1/unload_lora_adapter", "/v1/pin_lora_adapter"):
        refusal = post(engine, path, "ben", **name)
        assert refusal.status_code == 403
        assert refusal.json()["error"]["type"] == "PermissionDeniedError"
    used = complete(engine, "ben", model="mine").json()["choices"][0]["token_ids"]
    assert used == expected_tokens(PROMPT, "red", max_tokens=2)
    assert complete(engine, "ben", priority=-1).status_code == 403
    rows = {}
    for key in ("ann", "ben"):
        url = f"http://{engine.http_endpoint}/v1/lora_adapters/mine"
        rows[key] = httpx.get(url, headers=bearer(key)).json()
    assert [row["owner"] for row in rows.values()] == ["ann", None]
    assert rows["ben"]["path"] is None
    assert post(engine, "/v1/unload_lora_adapter", "admin", **name).status_code == 200


def test_a_broken_file_leaves_the_old_keys(engine: Engine, folder: Path) -> None:
    (folder / "keys.yaml").write_text("tenants: {ann: {keys: [{key: short}]}}")
    with pytest.raises(ConfigError, match="20 to 512"):
        engine.reload_keys()
    assert complete(engine, "ann").status_code == 200


def test_a_revoked_key_ends_no_stream(engine: Engine, folder: Path) -> None:
    url = f"http://{engine.http_endpoint}/v1/completions"
    body = {"prompt": [7], "max_tokens": 400, "stream": True, "return_token_ids": True}
    headers = bearer("ann")
    tokens: list[int] = []
    with httpx.stream("POST", url, json=body, headers=headers, timeout=GUARD_S) as response:
        lines = response.iter_lines()
        events = (json.loads(line[6:]) for line in lines if line.startswith("data: {"))
        tokens += next(events)["choices"][0]["token_ids"]
        reload(engine, folder, ben={})
        assert complete(engine, "ann").status_code == 401
        assert len(tokens) < 400
        for event in events:
            tokens += event["choices"][0]["token_ids"]
    assert tokens == expected_tokens([7], max_tokens=400)
    reload(engine, folder, **{**FREE, "cid": {}})
    assert [complete(engine, key).status_code for key in ("ann", "cid")] == [200, 200]


async def crowd(engine: Engine, key: str) -> tuple[list[httpx.Response], float]:
    """Lets 50 clients with connections of their own ask four times each.

    Returns all answers, and the seconds from the first request to the last answer.
    """
    url = f"http://{engine.http_endpoint}/v1/completions"
    answers: list[httpx.Response] = []
    start = time.monotonic()
    connections = httpx.Limits(max_connections=NUM_CLIENTS)
    async with httpx.AsyncClient(
        timeout=GUARD_S, headers=bearer(key), limits=connections
    ) as client:

        async def ask(number: int) -> None:
            for _ in range(4):
                body = {"prompt": [number, 1, 2], "max_tokens": 7, "ignore_eos": True}
                answers.append(await client.post(url, json=body))

        await asyncio.gather(*(ask(number) for number in range(NUM_CLIENTS)))
    return answers, time.monotonic() - start


@pytest.mark.parametrize(
    ("limits", "kind"),
    [
        ({"requests_per_minute": 30}, "requests a minute"),
        ({"tokens_per_minute": 300}, "tokens a minute"),
        ({"max_running_requests": 3}, "max_running_requests is 3"),
    ],
)
def test_limits_hold_under_50_clients(
    engine: Engine, folder: Path, limits: dict[str, int], kind: str
) -> None:
    """All of them through both HTTP servers; another tenant notices nothing."""
    reload(engine, folder, **{**FREE, "dan": {"limits": limits}})
    answers, elapsed = asyncio.run(crowd(engine, "dan"))
    accepted = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code != 200]
    minutes = 1 + elapsed / 60
    num_tokens = sum(answer.json()["usage"]["total_tokens"] for answer in accepted)
    assert num_tokens == 10 * len(accepted)
    if "requests_per_minute" in limits:
        assert 30 <= len(accepted) <= 30 * minutes
    if "tokens_per_minute" in limits:
        assert 300 <= num_tokens <= 300 * minutes
    assert accepted and refused
    for answer in refused:
        assert answer.status_code == 429
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("RateLimitError", 429)
        assert "tenant 'dan'" in error["message"] and kind in error["message"]
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert complete(engine, "ben").status_code == 200


def test_no_more_than_the_limit_run_at_one_time(engine: Engine, folder: Path) -> None:
    reload(engine, folder, **{**FREE, "eve": {"limits": {"max_running_requests": 4}}})

    async def ask(client: httpx.AsyncClient, number: int, n: int) -> int:
        url = f"http://{engine.http_endpoint}/v1/completions"
        body = {"prompt": [number], "max_tokens": 100, "n": n, "ignore_eos": True}
        return (await client.post(url, json=body, headers=bearer("eve"))).status_code

    async def ask_all(counts: list[int]) -> tuple[Counter[int], int]:
        """Returns the statuses, and the most requests that the scheduler had at one time."""
        peak = 0
        async with (
            httpx.AsyncClient(timeout=GUARD_S) as client,
            AsyncClient(engine.endpoint, timeout_s=GUARD_S) as observer,
        ):
            asked = (ask(client, number, n) for number, n in enumerate(counts))
            answers = asyncio.gather(*asked)
            while not answers.done():
                stats = await observer.stats()
                peak = max(peak, stats["running"] + stats["waiting"])
                await asyncio.sleep(0.02)
        return Counter(await answers), peak

    statuses, peak = asyncio.run(ask_all([1] * NUM_CLIENTS))
    assert peak == 4 and statuses[200] >= 4
    assert statuses[200] + statuses[429] == NUM_CLIENTS
    assert asyncio.run(ask_all([5]))[0] == {429: 1}
    assert asyncio.run(ask_all([2, 2])) == ({200: 2}, 4)


def test_metrics_are_for_the_operator(engine: Engine) -> None:
    url = f"http://{engine.http_endpoint}/metrics"
    statuses = [httpx.get(url, headers=bearer(key)).status_code for key in ("admin", "ann", "?")]
    assert statuses == [200, 403, 401]
    assert "vllm:num_requests_running" in httpx.get(url, headers=bearer("admin")).text
