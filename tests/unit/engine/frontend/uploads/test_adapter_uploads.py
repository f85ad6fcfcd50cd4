"""Tensors that clients send: who may, how much, and that nothing of them stays."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import pytest

from loraplex.engine.adapters.tensors.memory_file import MemoryFile
from loraplex.engine.config import AdapterConfig, ServerConfig
from loraplex.engine.errors import ClientError
from loraplex.engine.frontend.inputs import TextCodec
from loraplex.engine.frontend.queries import QueryTable
from loraplex.engine.frontend.scheduler_link import SchedulerLink
from loraplex.engine.frontend.uploads.tensor_loads import TensorLoads
from loraplex.engine.frontend.uploads.upload_request import LoadAdapterTensorsRequest
from loraplex.engine.ipc.messages.frontend import AdapterCommand, AdapterReply
from loraplex.memory.config import MemoryConfig

from helpers.fakes.frontend_harness import A, B, FrontendHarness

LIMIT = 1000
IPC = ServerConfig(endpoint="ipc:///tmp/unused")


def make_harness(codec: TextCodec, server: ServerConfig = IPC) -> FrontendHarness:
    return FrontendHarness(
        codec,
        server=server,
        memory=MemoryConfig(adapter_host_bytes=LIMIT),
        adapter=AdapterConfig(adapter_mixes=(("blend", "a,b"),)),
    )


@pytest.fixture
def harness(codec: TextCodec) -> Iterator[FrontendHarness]:
    made = make_harness(codec)
    yield made
    made.frontend.close()


def upload(harness: FrontendHarness, *frames: bytes, client: bytes = A, **values: Any) -> None:
    message = {
        "type": "load_adapter_tensors", "request_id": "r", "name": "x", "config": {"r": 4},
    } | values  # fmt: skip
    harness.frontend.on_frames(client, [msgpack.packb(message), *frames])


def in_memory(file: MemoryFile) -> dict[str, Any]:
    return dataclasses.asdict(file.place)


def read(fd: int) -> bytes:
    return os.pread(fd, 1 << 20, 0)


def refusal(harness: FrontendHarness) -> tuple[str, str]:
    (reply,) = harness.take()
    assert reply["type"] == "error"
    assert not harness.sent
    return reply["code"], reply["message"]


def open_memory_files() -> set[str]:
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    targets = {os.readlink(link) for link in links if os.path.lexists(link)}
    return {target for target in targets if "memfd:loraplex" in target}


@pytest.fixture(autouse=True)
def num_memory_files() -> Iterator[Callable[[], int]]:
    """Counts those that the test has made. Tests before it in this process may have left some."""
    before = open_memory_files()
    yield lambda: len(open_memory_files() - before)
    assert open_memory_files() <= before


def test_frames_become_files_until_the_scheduler_answers(
    harness: FrontendHarness, num_memory_files: Callable[[], int]
) -> None:
    upload(harness, b"head", b"", b"tensors")
    harness.run_pooled()
    (command,) = harness.take_sent(AdapterCommand)
    assert (command.op, command.name, command.source) == ("load", "x", None)
    assert command.memory.pid == os.getpid()
    assert read(command.memory.tensors_fd) == b"headtensors"
    assert read(command.memory.config_fd) == b'{"r": 4}'
    harness.frontend.on_scheduler(AdapterReply(command.command_id, adapters=[{"name": "x"}]))
    assert harness.take() == [{"type": "adapters", "request_id": "r", "adapters": [{"name": "x"}]}]
    assert num_memory_files() == 0


def test_memory_of_the_client_is_opened(
    harness: FrontendHarness, num_memory_files: Callable[[], int]
) -> None:
    file = MemoryFile.of([b"all"])
    upload(harness, memory=in_memory(file))
    file.close()  # the client has died
    (command,) = harness.take_sent(AdapterCommand)
    assert read(command.memory.tensors_fd) == b"all"
    harness.frontend.on_scheduler(AdapterReply(command.command_id, error="no"))
    assert refusal(harness) == ("adapter", "no")
    assert num_memory_files() == 0


def test_memory_that_cannot_be_reached_has_its_own_code(harness: FrontendHarness) -> None:
    upload(harness, memory={"pid": 1, "fd": 0, "name": "loraplex-guess"})
    assert refusal(harness)[0] == "unreachable_memory"


def test_over_tcp_only_if_the_server_allows_it(
    codec: TextCodec, num_memory_files: Callable[[], int]
) -> None:
    closed = make_harness(codec, ServerConfig())
    upload(closed, b"tensors")
    code, text = refusal(closed)
    assert code == "forbidden" and "--allow-adapter-upload" in text
    file = MemoryFile.of([b"all"])
    upload(closed, memory=in_memory(file))
    assert refusal(closed)[0] == "forbidden"
    file.close()
    closed.frontend.close()
    opened = make_harness(codec, ServerConfig(allow_adapter_upload=True))
    upload(opened, b"tensors")
    opened.run_pooled()
    assert opened.take_sent(AdapterCommand)
    opened.frontend.close()
    assert num_memory_files() == 0


def test_a_cluster_takes_none(harness: FrontendHarness) -> None:
    message = LoadAdapterTensorsRequest(request_id="r", name="x", config=b"{}")
    queries = QueryTable(lambda client, reply: None)
    loads = TensorLoads(queries, SchedulerLink(harness))
    with pytest.raises(ClientError, match="a cluster takes no tensors: save the adapter") as error:
        loads.add(A, message, [b"tensors"])
    assert error.value.code == "forbidden"


def test_too_many_bytes_are_refused(
    harness: FrontendHarness, num_memory_files: Callable[[], int]
) -> None:
    upload(harness, b"x" * LIMIT, b"x")
    code, text = refusal(harness)
    assert code == "too_large" and "1001 bytes" in text and "adapter_host_bytes" in text
    file = MemoryFile.of([b"x" * (LIMIT + 1)])
    upload(harness, memory=in_memory(file))
    assert refusal(harness)[0] == "too_large"
    file.close()
    assert num_memory_files() == 0


def test_loads_at_one_time_share_the_limit(harness: FrontendHarness) -> None:
    upload(harness, b"x" * 600)
    upload(harness, b"x" * 600, client=B)
    (reply,) = harness.take(B)
    assert reply["code"] == "queue_full"
    harness.run_pooled()
    (command,) = harness.take_sent(AdapterCommand)
    harness.frontend.on_scheduler(AdapterReply(command.command_id, adapters=[]))
    harness.take()
    upload(harness, b"x" * 600, client=B)
    harness.run_pooled()
    assert harness.take_sent(AdapterCommand)


def test_a_dead_engine_leaves_no_memory(
    harness: FrontendHarness, num_memory_files: Callable[[], int]
) -> None:
    file = MemoryFile.of([b"all"])
    upload(harness, memory=in_memory(file))
    upload(harness, b"frames", request_id="r2")
    harness.frontend.fail_all("the engine has died")
    assert [reply["code"] for reply in harness.take()] == ["engine_dead"] * 2
    harness.frontend.close()
    file.close()
    assert num_memory_files() == 0


@pytest.mark.parametrize(
    ("frames", "values", "text"),
    [
        ([], {}, "must hold the tensors"),
        ([b""], {}, "must hold the tensors"),
        ([b"x"], {"memory": {"pid": 1, "fd": 1, "name": "n"}}, "not both"),
        ([b"x"], {"config": "{}"}, "config: must be the map"),
        ([b"x"], {"config": {"lora_alpha": float("nan")}}, "config: is not what"),
        ([b"x"], {"config": {"x": b"bytes"}}, "config: is not what"),
        ([], {"memory": {"pid": 1}}, "memory: must be a map"),
        ([], {"memory": {"pid": -1, "fd": 1, "name": "n"}}, "memory: pid and fd"),
        ([], {"memory": {"pid": 1, "fd": True, "name": "n"}}, "memory: pid and fd"),
        ([b"x"], {"name": "-x"}, "name: "),
        ([b"x"], {"name": "blend"}, "is a mix"),
        ([b"x"], {"lazy": True}, "does not take 'lazy'"),
    ],
)
def test_wrong_messages_are_refused_by_name(
    harness: FrontendHarness, frames: list[bytes], values: dict[str, Any], text: str
) -> None:
    upload(harness, *frames, **values)
    code, message = refusal(harness)
    assert code == "bad_request" and text in message


def test_other_messages_are_one_frame(harness: FrontendHarness) -> None:
    message = msgpack.packb({"type": "health", "request_id": "r"})
    harness.frontend.on_frames(A, [message, b"more"])
    assert refusal(harness)[0] == "malformed"
