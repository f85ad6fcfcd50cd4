"""Adapters used by name from a real S3 server, through the whole engine with a fake worker."""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs

from loraplex.engine.config import AdapterConfig
from loraplex.engine.errors import ClientError, UnknownAdapterError
from loraplex.engine.frontend.mixing import stored_names
from loraplex.engine.store_config import StoreConfig
from loraplex.engine.stores.disk_cache import DiskCache
from loraplex.entrypoints.client.lora_mix import LoRAMix
from loraplex.entrypoints.client.outputs import RequestFailure, RequestOutput

from helpers.fakes.fake_engine import expected_tokens, make_fake_adapter
from helpers.fakes.in_process_client import TEN, InProcessClient
from helpers.stores.s3_server import BUCKET, S3Server, line_to

pytestmark = pytest.mark.e2e
PROMPT = {"prompt_token_ids": [1, 2, 3]}


@pytest.fixture(autouse=True)
def _own_connections(aws: S3Server) -> Iterator[None]:
    """Keeps fsspec from using a connection of a test with another server address."""
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


def client_of(cache: Path, *stores: str, **options: Any) -> InProcessClient:
    store = StoreConfig(adapter_stores=stores, adapter_cache_dir=str(cache), **options)
    return InProcessClient(store=store)


def answer(client: InProcessClient, adapter: str | None) -> list[int]:
    (output,) = client.generate(PROMPT, TEN, adapter=adapter, stream=False)
    return list(output.outputs[0].token_ids)


def expected(content: str) -> list[int]:
    return expected_tokens([1, 2, 3], content, max_tokens=10)


def test_first_use_loads_it_and_it_is_listed_then(aws: S3Server, tmp_path: Path) -> None:
    aws.put_adapter("first/legal")
    aws.put_adapter("first/org/deep")
    with client_of(tmp_path, f"s3://{BUCKET}/first") as client:
        assert client.list_adapters() == []
        assert answer(client, "legal") == expected("content of first/legal")
        assert answer(client, "org/deep") == expected("content of first/org/deep")
        rows = {row["name"]: row for row in client.list_adapters()}
        assert set(rows) == {"legal", "org/deep"}
        assert rows["legal"]["is_from_store"]
        with pytest.raises(UnknownAdapterError, match=f"no store has it: s3://{BUCKET}/first"):
            answer(client, "nobody")
        with pytest.raises(ClientError, match="no part of a name"):
            answer(client, "org/../legal")


def test_registered_names_go_before_stores_and_stores_in_their_order(
    aws: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_names, "REGISTERED_S", 0.0)
    aws.put_adapter("order/one/both")
    aws.put_adapter("order/two/both")
    aws.put_adapter("order/two/mine")
    mine = make_fake_adapter(tmp_path / "mine", "registered")
    store = StoreConfig(
        adapter_stores=(f"s3://{BUCKET}/order/one", f"s3://{BUCKET}/order/two"),
        adapter_cache_dir=str(tmp_path / "cache"),
    )
    adapter = AdapterConfig(adapters=(("mine", str(mine)),), adapter_root=str(tmp_path))
    with InProcessClient(store=store, adapter=adapter) as client:
        assert answer(client, "mine") == expected("registered")
        assert answer(client, "both") == expected("content of order/one/both")
        client.unload_adapter("mine")
        assert answer(client, "mine") == expected("content of order/two/mine")
        client.load_adapter("mine", str(mine))
        assert answer(client, "mine") == expected("registered")


def test_a_mix_of_stored_and_registered_adapters(aws: S3Server, tmp_path: Path) -> None:
    aws.put_adapter("mix/a")
    with client_of(tmp_path, f"s3://{BUCKET}/mix") as client:
        mix = LoRAMix([("a", 0.5), ("nobody", 0.5)])
        with pytest.raises(UnknownAdapterError, match="'nobody'"):
            list(client.generate(PROMPT, TEN, adapter=mix))


def test_an_overwritten_adapter_is_seen_after_the_time_to_live(
    aws: S3Server, tmp_path: Path
) -> None:
    aws.put_adapter("ttl/legal", "old content")
    with client_of(tmp_path, f"s3://{BUCKET}/ttl", adapter_store_ttl_s=0.5) as client:
        assert answer(client, "legal") == expected("old content")
        aws.put_adapter("ttl/legal", "new content")
        time.sleep(0.6)
        deadline = time.monotonic() + 60
        while (tokens := answer(client, "legal")) != expected("new content"):
            assert tokens == expected("old content")
            assert time.monotonic() < deadline
        aws.remove("ttl/legal")
        time.sleep(0.6)
        with pytest.raises(UnknownAdapterError):
            while time.monotonic() < deadline:
                answer(client, "legal")


@pytest.mark.parametrize(
    ("num_stored", "num_rounds"), [(100, 4), pytest.param(1000, 20, marks=pytest.mark.long)]
)
def test_a_thousand_names_never_exceed_the_bytes_of_twenty(
    aws: S3Server, tmp_path: Path, num_stored: int, num_rounds: int
) -> None:
    """Fifty requests at a time; the short run asks for most of the names in vain."""
    names = [f"n{number}" for number in range(1000)]
    for name in names[:num_stored]:
        aws.put_adapter(f"many{num_stored}/{name}", weights=bytes(10_000))
    max_bytes = 20 * 10_100
    random.Random(1).shuffle(names)
    store = f"s3://{BUCKET}/many{num_stored}"
    num_answers = 0
    with client_of(tmp_path, store, adapter_cache_bytes=max_bytes) as client:
        for first in range(0, 50 * num_rounds, 50):
            asked = {
                client.submit(PROMPT, TEN, adapter=name): name for name in names[first : first + 50]
            }
            while client.num_outstanding:
                results = client.poll(5.0)
                with DiskCache(tmp_path, max_bytes).exclusive():
                    files = [path for path in tmp_path.rglob("adapter_*") if path.is_file()]
                    assert sum(path.stat().st_size for path in files) <= max_bytes
                for result in results:
                    name = asked[result.request_id]
                    if int(name[1:]) >= num_stored:
                        assert isinstance(result, RequestFailure)
                        assert isinstance(result.error, UnknownAdapterError), result
                        continue
                    assert isinstance(result, RequestOutput), result
                    content = expected(f"content of many{num_stored}/{name}")
                    assert list(result.outputs[0].token_ids) == content
                    num_answers += 1
    assert num_answers > 10 * num_rounds * num_stored / 1000


def test_a_slow_download_delays_only_those_who_need_it(aws: S3Server, tmp_path: Path) -> None:
    aws.put_adapter("wait/slow", weights=bytes(4 << 20))
    with line_to(aws.url) as line, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", line.url)
        line.bytes_per_s = 150_000.0
        limit = {"adapter_store_timeout_s": 6.0}
        with client_of(tmp_path, f"s3://{BUCKET}/wait", **limit) as client:
            started = time.monotonic()
            waiting = client.submit(PROMPT, TEN, adapter="slow")
            num_answers = 0
            while client.num_outstanding:
                assert answer(client, None) == expected("")
                num_answers += 1
                for result in client.poll(0.0):
                    assert result.request_id == waiting
                    assert isinstance(result, RequestFailure)
                    assert "took longer than the 6 s" in str(result.error)
            assert num_answers > 20
            assert time.monotonic() - started < 20


def test_a_request_that_is_cancelled_lets_go_of_its_files(aws: S3Server, tmp_path: Path) -> None:
    """The cache holds one adapter; the second one comes in once the first one's request ends."""
    for name in ("a", "b"):
        aws.put_adapter(f"cancel/{name}", weights=bytes(10_000))
    with client_of(tmp_path, f"s3://{BUCKET}/cancel", adapter_cache_bytes=10_100) as client:
        for name in ("a", "b", "a"):
            stream = client.generate(PROMPT, TEN, adapter=name)
            next(stream)
            stream.close()
        assert answer(client, "b") == expected("content of cancel/b")


def ask_as(client: InProcessClient, tenant: str, adapter: str) -> list[int] | str:
    """Returns the tokens, or the code of the error."""
    message = {
        "type": "generate", "request_id": "t", "prompt_token_ids": [1, 2, 3], "tenant": tenant,
        "adapter": adapter, "sampling_params": {"max_tokens": 10, "temperature": 0.0},
        "stream": False,
    }  # fmt: skip
    client.engine.send(message)
    while True:
        for reply in client.engine.receive(10.0):
            if reply["type"] == "error":
                return str(reply["code"])
            return list(reply["outputs"][0]["token_ids"])


def rows_for(client: InProcessClient, tenant: str) -> set[str]:
    client.engine.send({"type": "list_adapters", "request_id": "l", "tenant": tenant})
    (reply,) = client.engine.receive(10.0)
    return {row["name"] for row in reply["adapters"]}


def test_two_tenants_cannot_read_each_others(aws: S3Server, tmp_path: Path) -> None:
    for path in ("ann/legal", "ben/legal", "ann/secret"):
        aws.put_adapter(f"tenants/{path}")
    aws.put_adapter("shared/common")
    stores = (f"s3://{BUCKET}/tenants/{{tenant}}", f"s3://{BUCKET}/shared")
    with client_of(tmp_path, *stores) as client:
        for _ in range(2):
            assert ask_as(client, "ann", "legal") == expected("content of tenants/ann/legal")
            assert ask_as(client, "ben", "legal") == expected("content of tenants/ben/legal")
            assert ask_as(client, "ann", "secret") == expected("content of tenants/ann/secret")
            for tenant in ("ben", "", "an"):
                assert ask_as(client, tenant, "secret") == "unknown_adapter"
            for name in ("ann/secret", "tenants/ann/secret", "ann/../ann/secret", "@ann/secret"):
                assert ask_as(client, "ben", name) in ("unknown_adapter", "bad_request")
            assert ask_as(client, "..", "legal") == "forbidden"
            for tenant in ("ann", "ben", ""):
                assert ask_as(client, tenant, "common") == expected("content of shared/common")
        assert rows_for(client, "ann") == {"legal", "secret", "common"}
        assert rows_for(client, "ben") == {"legal", "common"}
        assert rows_for(client, "") == {"@ann/legal", "@ben/legal", "@ann/secret", "common"}


def test_a_name_that_another_tenant_registers_takes_no_stored_one(
    aws: S3Server, tmp_path: Path
) -> None:
    """Ben registers names that the stores have: his own requests get his, all others theirs."""
    aws.put_adapter("names/ann/legal")
    aws.put_adapter("open/common")
    trap = make_fake_adapter(tmp_path / "root" / "trap", "ben's trap")
    store = StoreConfig(
        adapter_stores=(f"s3://{BUCKET}/names/{{tenant}}", f"s3://{BUCKET}/open"),
        adapter_cache_dir=str(tmp_path / "cache"),
    )
    adapter = AdapterConfig(adapter_root=str(tmp_path / "root"))
    with InProcessClient(store=store, adapter=adapter) as client:
        for name in ("legal", "common", "other"):
            load = {"type": "load_adapter", "name": name, "path": str(trap), "tenant": "ben"}
            client.engine.send({**load, "request_id": name})
            (reply,) = client.engine.receive(10.0)
            assert reply["type"] == "adapters", reply
        for _ in range(2):
            assert ask_as(client, "ann", "legal") == expected("content of names/ann/legal")
            assert ask_as(client, "ann", "common") == expected("content of open/common")
            assert ask_as(client, "", "common") == expected("content of open/common")
            assert ask_as(client, "ben", "legal") == expected("ben's trap")
            assert ask_as(client, "ben", "common") == expected("ben's trap")
            assert ask_as(client, "ann", "other") == expected("ben's trap")
