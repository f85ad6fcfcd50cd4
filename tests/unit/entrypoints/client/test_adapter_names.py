"""Whoever names a path gets what lies at that path now, or a clear refusal."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex.engine.config import AdapterConfig
from loraplex.engine.errors import AdapterError, ClientError, UnknownAdapterError
from loraplex.entrypoints.client.lora_request import LoRARequest
from loraplex.entrypoints.client.sync_client import Client

from helpers.fakes.fake_engine import expected_tokens
from helpers.fakes.in_process_client import TEN, InProcessClient, RecordingEngine, last

PROMPT = [1, 2, 3]


def write(folder: Path, content: str) -> str:
    """Makes `folder` an adapter of this content. Returns its path."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(content, encoding="utf-8")
    return str(folder)


def answer(client: Client, adapter: LoRARequest | str) -> list[int]:
    return list(last(client.generate(PROMPT, TEN, adapter=adapter)).outputs[0].token_ids)


def answer_of(content: str) -> list[int]:
    return expected_tokens(PROMPT, content, max_tokens=10)


@pytest.mark.parametrize("new_id", [1, 2])
def test_a_folder_overwritten_between_two_calls(
    client: InProcessClient, tmp_path: Path, new_id: int
) -> None:
    path = write(tmp_path / "mine", "before")
    assert answer(client, LoRARequest("mine", 1, path)) == answer_of("before")
    write(tmp_path / "mine", "after, and longer")
    assert answer(client, LoRARequest("mine", new_id, path)) == answer_of("after, and longer")
    assert answer(client, "mine") == answer_of("after, and longer")


def test_a_link_that_leads_to_another_folder_now(client: InProcessClient, tmp_path: Path) -> None:
    for name in ("v1", "v2"):
        write(tmp_path / name, f"content of {name}")
    link = tmp_path / "current"
    for name in ("v1", "v2"):
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / name)
        assert answer(client, LoRARequest("x", 1, str(link))) == answer_of(f"content of {name}")


def test_an_unchanged_folder_is_read_once(client: InProcessClient, tmp_path: Path) -> None:
    request = LoRARequest("a", 1, str(tmp_path / "a"))
    for _ in range(3):
        assert answer(client, request) == answer_of("content of a")
    (listed,) = client.list_adapters()
    assert (listed["usage"]["num_loads"], listed["usage"]["num_requests"]) == (1, 3)
    assert listed["usage"]["hits"] == {"pages": 2, "host": 0, "disk": 1}


@pytest.fixture
def two_clients(tmp_path: Path) -> Iterator[tuple[Client, Client]]:
    """Two clients of one engine."""
    for name in ("a", "b"):
        write(tmp_path / name, f"content of {name}")
    engine = RecordingEngine(adapter=AdapterConfig(adapter_root=str(tmp_path)))
    yield Client(engine), Client(engine)
    engine.close()


def test_one_name_under_two_paths(two_clients: tuple[Client, Client], tmp_path: Path) -> None:
    one, two = two_clients
    path_a, path_b = str(tmp_path / "a"), str(tmp_path / "b")
    assert answer(one, LoRARequest("x", 1, path_a)) == answer_of("content of a")
    with pytest.raises(AdapterError, match=f"'x' is the folder {path_a}, not {path_b}.*load_inpl"):
        answer(two, LoRARequest("x", 1, path_b))
    assert answer(two, LoRARequest("x", 1, path_b, load_inplace=True)) == answer_of("content of b")
    with pytest.raises(AdapterError, match="load_inplace=True"):
        answer(one, LoRARequest("x", 1, path_a))
    assert answer(one, "x") == answer_of("content of b")


def test_running_requests_keep_their_version(client: InProcessClient, tmp_path: Path) -> None:
    path_a, path_b = str(tmp_path / "a"), str(tmp_path / "b")
    running = client.generate(PROMPT, TEN, adapter=LoRARequest("x", 1, path_a))
    next(running)
    replacing = LoRARequest("x", 1, path_b, load_inplace=True)
    assert answer(client, replacing) == answer_of("content of b")
    assert list(last(running).outputs[0].token_ids) == answer_of("content of a")


def test_an_engine_that_was_started_again(tmp_path: Path) -> None:
    request = LoRARequest("x", 1, write(tmp_path / "x", "content"))
    for _ in range(2):
        with InProcessClient(adapter=AdapterConfig(adapter_root=str(tmp_path))) as client:
            assert answer(client, request) == answer_of("content")


def test_an_adapter_that_another_client_unloaded(
    two_clients: tuple[Client, Client], tmp_path: Path
) -> None:
    one, two = two_clients
    request = LoRARequest("x", 1, str(tmp_path / "a"))
    assert answer(one, request) == answer_of("content of a")
    two.unload_adapter("x")
    with pytest.raises(UnknownAdapterError):
        answer(one, "x")
    assert answer(one, request) == answer_of("content of a")


def test_a_folder_that_is_mended(client: InProcessClient, tmp_path: Path) -> None:
    request = LoRARequest("x", 1, str(tmp_path / "x"))
    with pytest.raises(AdapterError, match="x is no directory"):
        answer(client, request)
    (tmp_path / "x").mkdir()
    for _ in range(2):
        with pytest.raises(AdapterError, match=r"adapter_config\.json"):
            answer(client, request)
    with pytest.raises(AdapterError, match="mend it, then load it again or send its path"):
        answer(client, "x")
    write(tmp_path / "x", "mended")
    assert answer(client, request) == answer_of("mended")
    assert answer(client, "x") == answer_of("mended")


def test_a_registered_folder_and_the_same_path(tmp_path: Path) -> None:
    path = write(tmp_path / "x", "at start")
    config = AdapterConfig(adapters=(("x", path),), adapter_root=str(tmp_path))
    with InProcessClient(adapter=config) as client:
        assert answer(client, LoRARequest("x", 1, "x")) == answer_of("at start")
        write(tmp_path / "x", "and later")
        assert answer(client, "x") == answer_of("at start"), "a name alone is the server's"
        assert answer(client, LoRARequest("x", 1, "x")) == answer_of("and later")


def test_paths_of_requests_stay_under_the_root(client: InProcessClient) -> None:
    for path in ("/etc", "../elsewhere"):
        with pytest.raises(ClientError, match="adapter 'x': .*outside the server's") as caught:
            answer(client, LoRARequest("x", 1, path))
        assert caught.value.code == "forbidden"
    assert client.list_adapters() == []
