"""The choice of a step's graph, which never leaves out its adapters, and the end of a capture."""

import time
from typing import Any

import numpy as np
import pytest
import torch

from loraplex.backends.lora.contract import LoRABatch, LoRASpec
from loraplex.backends.lora.torch_bmm import TorchLoRA
from loraplex.engine.config import GraphConfig
from loraplex.engine.worker.graphs.capture import (
    BASE,
    GraphLadder,
    GraphRecorder,
    StaticInputs,
    empty_batch,
    kind_of,
)
from loraplex.engine.worker.graphs.mixed import mixed_ladder
from loraplex.engine.worker.step_rows import TokenInputs

from helpers.fakes.fake_graphs import FakeRecorder


class TwoKinds:
    """The part of a LoRA op on which the choice of a graph depends."""

    graph_kinds = ("few", "many")
    max_graph_rows = 4

    def kind_of(self, *, table: Any, batch: LoRABatch) -> str:
        return "few" if len(batch.segment_slots) < 3 else "many"


def make_batch(slots: list[int]) -> LoRABatch:
    used, counts = np.unique([slot for slot in slots if slot >= 0], return_counts=True)
    return LoRABatch(
        num_tokens=len(slots),
        token_order=np.argsort(slots, kind="stable")[slots.count(-1) :].astype(np.int32),
        segment_starts=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
        segment_slots=used.astype(np.int32),
    )


def make_ladder(lora, sizes=(8, 4, 2, 1), capacity: int = 1 << 30) -> GraphLadder:
    """A graph is its own key."""
    ladder, recorder = GraphLadder(lora), FakeRecorder(capacity)

    def capture_one(size: int, kind: str | None) -> tuple[int, str | None]:
        recorder.record(lambda: None, warm_up=False)
        return size, kind

    ladder.capture(sizes, recorder, capture_one)
    return ladder


@pytest.mark.parametrize("slots", [[5], [-1, 3], [0, 0, 0], [1, -1, 2, 3], [7] * 8])
def test_an_op_that_is_never_captured_gets_no_graph(slots) -> None:
    cpu = torch.device("cpu")
    lora = TorchLoRA(LoRASpec(8, 16, torch.float32, cpu, 64, ()))
    ladder = make_ladder(lora)
    assert ladder.fit(len(slots), kind_of(lora, None, make_batch(slots))) == 0
    size = ladder.fit(len(slots), kind_of(lora, None, make_batch([-1] * len(slots))))
    assert size >= len(slots) and ladder[size, BASE] == (size, BASE)


def test_a_graph_of_the_steps_kind() -> None:
    lora = TwoKinds()
    ladder = make_ladder(lora)
    assert ladder.describe("rows") == " of 1 to 8 rows" and len(ladder) == 3 * 3 + 1
    for slots, kind, size in (
        ([-1, -1, -1], BASE, 4), ([-1] * 6, BASE, 8), ([2], "few", 1), ([2, 2, -1], "few", 4),
        ([0, 1, 2], "many", 4), ([2] * 5, "few", 0), ([-1] * 9, BASE, 0),
    ):  # fmt: skip
        batch = make_batch(slots)
        assert kind_of(lora, None, batch) == kind
        assert ladder.fit(len(slots), kind) == size


def test_capture_stops_after_a_whole_size() -> None:
    sizes = (8, 2, 4, 1)
    for capacity, want in ((0, ()), (1, (8,)), (2, (2, 8)), (4, (2, 8)), (5, (2, 4, 8))):
        ladder = make_ladder(TwoKinds(), sizes, capacity)
        said = f" of {want[0]} to {want[-1]} rows" if want else ""
        assert ladder.describe("rows") == said
        for num_rows in range(1, 10):
            for kind in ("few", "many", BASE):
                fitting = [s for s in want if s >= num_rows]
                is_there = fitting and (kind is BASE or fitting[0] <= 4)
                assert ladder.fit(num_rows, kind) == (fitting[0] if is_there else 0)


def test_rare_kinds_have_few_sizes() -> None:
    ladder, recorder = make_ladder(TwoKinds()), FakeRecorder()

    def capture_one(size: int, kind: str | None) -> tuple[int, str | None]:
        recorder.record(lambda: None, warm_up=False)
        return size, kind

    ladder.capture([8, 4, 2], recorder, capture_one, kinds=("few+vectors",))
    assert recorder.num_recorded == 2  # 8 rows are more than the op's graphs take
    for num_rows, size in ((1, 2), (2, 2), (3, 4), (4, 4), (5, 0)):
        assert ladder.fit(num_rows, "few+vectors") == size
    assert ladder.fit(1, "few") == 1 and ladder.fit(1, "many+vectors") == 0
    assert ladder[4, "few+vectors"] == (4, "few+vectors")
    assert ladder.describe("rows") == " of 1 to 8 rows"


def test_ladder_of_mixed_steps() -> None:
    assert sorted(mixed_ladder(8192)) == [8, 16, *range(32, 1025, 32)]
    assert mixed_ladder(512)[:8] == [512, 256, 384, 128, 448, 320, 192, 64]
    assert mixed_ladder(512)[-2:] == [16, 8]
    assert mixed_ladder(100) == [100, 64, 96, 32, 16, 8]
    assert [mixed_ladder(n) for n in (1, 8, 9, 32)] == [[1], [8], [9, 8], [32, 16, 8]]


@pytest.mark.parametrize("max_rows", [1, 6, 7])
def test_padded_rows_feed_the_null_page(max_rows: int) -> None:
    static = StaticInputs(max_rows, torch.device("cpu"))
    addresses = [tensor.data_ptr() for tensor in _of(static, max_rows)]
    for count in (max_rows, 1, max_rows // 2):
        values = [np.arange(count, dtype=np.int64) + 10 * i + 1 for i in range(3)]
        static.upload(TokenInputs(*values))
        tensors = _of(static, max_rows)
        assert [tensor.data_ptr() for tensor in tensors] == addresses
        for tensor, value in zip(tensors, values, strict=True):
            assert tensor.tolist() == [*value, *[0] * (max_rows - count)]
    static.clear()
    assert not any(tensor.any() for tensor in _of(static, max_rows))
    assert empty_batch(max_rows).is_empty and empty_batch(max_rows).num_tokens == max_rows


def _of(static: StaticInputs, num_rows: int) -> tuple[torch.Tensor, ...]:
    inputs = static.first(num_rows)
    return inputs.places, inputs.positions, inputs.kv_rows


def test_the_recorder_is_full_by_time_or_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    free, now = [10 << 30], [100.0]
    for name in ("synchronize", "empty_cache", "graph_pool_handle", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 0))
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    config = GraphConfig(graph_bytes=1 << 30, graph_seconds=30.0)
    for take, seconds, want in (
        (1 << 30, 30.0, "in 30.0 s and 1024 MiB"),
        ((1 << 30) + 1, 1.0, "in 1.0 s and 1024 MiB, then the memory (1024 MiB) was full"),
        (1 << 20, 31.0, "in 31.0 s and 1 MiB, then the time (30 s) was up"),
    ):
        recorder = GraphRecorder(torch.device("cpu"), config)
        assert not recorder.is_full
        free[0], now[0] = free[0] - take, now[0] + seconds
        assert recorder.is_full == ("then" in want) and recorder.finish() == want
