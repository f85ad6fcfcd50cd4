"""Grouping of rows by adapter, the table, and the per-slot state behind a step."""

from typing import Any

import numpy as np
import pytest
import torch

from loraplex.backends.launch.upload import Uploader
from loraplex.engine.adapters.table import AdapterTable, group_rows
from loraplex.engine.adapters.target import AdapterTarget
from loraplex.engine.model.shard import whole_modules
from loraplex.engine.worker.request_states import RequestStates
from loraplex.memory.adapter_layout import ModuleShape
from loraplex.memory.host.store import PackedAdapter
from loraplex.scheduler.worker_protocol import (
    AdapterBinding,
    NewRequest,
    SamplingSpec,
    StepPlan,
    int_array,
)

from helpers.running.step_driver import GREEDY

TARGET = AdapterTarget(2, whole_modules((ModuleShape(64, 64),) * 7), 128, torch.float32, max_rank=4)


@pytest.mark.parametrize("seed", range(6))
def test_group_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    slots = rng.integers(-1, 5, size=int(rng.integers(0, 20))).astype(np.int32)
    counts = rng.integers(1, 6, size=len(slots)).astype(np.int32)
    batch = group_rows(slots, counts)
    of_token = [int(s) for s, n in zip(slots, counts, strict=True) for _ in range(n)]
    assert batch.num_tokens == len(of_token)
    present = sorted({slot for slot in of_token if slot >= 0})
    assert batch.segment_slots.tolist() == present and batch.is_empty == (not present)
    for index, slot in enumerate(present):
        start, end = batch.segment_starts[index : index + 2]
        rows = batch.token_order[start:end].tolist()
        assert rows == [row for row, s in enumerate(of_token) if s == slot]
    assert len(batch.segment_starts) == len(present) + 1
    for part in (batch.token_order, batch.segment_starts, batch.segment_slots):
        assert part.dtype == np.int32
    assert batch.segment_starts[-1] == len(batch.token_order)


def make_packed(value: int) -> PackedAdapter:
    whole = torch.full((2, 7), value, dtype=torch.int32)
    starts = (whole + n for n in range(5))
    return PackedAdapter("hash", 2, torch.zeros(2, 256), *starts, whole / 2)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_table_rows_come_and_go(device: str) -> None:
    table = AdapterTable(TARGET, 4, torch.device(device))
    # rank 4, gain and shift on all seven modules of 64 -> 64: 7 * (4 * 128 + 2 * 2 * 64) elements
    assert table.num_slots == 4 and table.table.page_table.shape == (4, 42)
    addresses = [getattr(table.table, name).data_ptr() for name in ("rank", "page_table")]
    for slot, value, page_ids in ((1, 3, [9, 5]), (2, 7, [4]), (1, 2, [8])):
        before = table.table.host_rank.clone()
        table.write_device(slot, make_packed(value), torch.tensor(page_ids, device=device))
        assert torch.equal(table.table.host_rank, before)  # that is another thread's
        table.write_host(slot, make_packed(value), torch.tensor(page_ids, dtype=torch.int32))
    table.check(table.table, np.array([1, 2, 2], dtype=np.int32))
    table.clear(2)
    for name, want, old in (
        ("rank", 2, 7),
        ("a_start", 3, 8),
        ("b_start", 4, 9),
        ("gain_start", 5, 10),
        ("shift_start", 6, 11),
        ("scale", 1, 3.5),
    ):
        got, host = getattr(table.table, name).cpu(), getattr(table.table, f"host_{name}")
        assert (got[..., 1] == want).all() and (host[..., 1] == want).all()
        assert (got[..., 2] == old).all(), "steps in flight may read it"
        assert not got[..., [0, 3]].any() and not host[..., [0, 2, 3]].any()
    assert table.table.host_has_vectors.tolist() == [False, True, False, False]
    with pytest.raises(ValueError, match=r"\[2, 3\], which are not loaded"):
        table.check(table.table, np.array([1, 2, 3], dtype=np.int32))
    assert table.table.page_table[1, 0] == 8 and table.table.host_page_table[1].sum() == 8
    assert addresses == [getattr(table.table, n).data_ptr() for n in ("rank", "page_table")]


def make_request(slot: int, num_tokens: int, pages: list[int], **changes: Any) -> NewRequest:
    return NewRequest(
        slot=slot,
        token_ids=int_array(range(100 * slot, 100 * slot + num_tokens)),
        num_prompt_tokens=num_tokens,
        page_ids=int_array(pages),
        bindings=[AdapterBinding(slot - 1)] if slot else [],
        sampling=SamplingSpec(**{**GREEDY, **changes}),
    )


def make_plan(new: list[NewRequest], freed: list[int], pages: list[tuple[int, int]]) -> StepPlan:
    empty = int_array()
    return StepPlan(
        0, int_array(freed), new, int_array([s for s, _ in pages]),
        int_array([p for _, p in pages]),
        empty, empty, empty, empty,
    )  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_states_follow_the_plans(device: str) -> None:
    states = RequestStates(
        max_num_seqs=4, max_model_len=20, block_tokens=4, vocab_size=50, device=torch.device(device)
    )
    uploader = Uploader(torch.device(device))

    def apply(*args: Any) -> None:
        states.write(uploader.upload(states.apply(make_plan(*args))))

    apply([make_request(2, 5, [7, 3]), make_request(0, 2, [9])], [], [])
    apply([], [], [(2, 11), (0, 4), (2, 12), (0, 5)])
    assert states.page_table[2, :4].tolist() == [7, 3, 11, 12]
    assert states.page_table[0, :3].tolist() == [9, 4, 5]
    assert states.token_ids.tolist()[2][:6] == [200, 201, 202, 203, 204, 0]
    assert states.adapter_rows[:, 0].tolist() == [-1, -1, 1, -1]
    assert states.num_bindings.tolist() == [0, 0, 1, 0]
    apply([make_request(2, 3, [6]), make_request(3, 1, [])], [2], [(3, 1), (2, 2)])
    assert states.page_table[2, :2].tolist() == [6, 2]
    assert states.page_table[3, :1].tolist() == [1]
    apply([], [0, 2, 3], [])
    assert not states.num_bindings.any() and (states.adapter_rows == -1).all()
    apply([make_request(1, 20, [1, 2, 3, 4, 5])], [], [])
    assert states.token_ids.tolist()[1] == [*range(100, 120), 0]
    assert states.token_ids.tolist()[2][:3] == [200, 201, 202]
    with pytest.raises(ValueError, match="21 tokens, above 20"):
        apply([make_request(1, 21, [])], [], [])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_upload_fills_a_given_tensor(device: str) -> None:
    uploader = Uploader(torch.device(device))
    out = torch.zeros(64, dtype=torch.uint8, device=device)
    arrays = {"a": np.arange(5, dtype=np.int32), "b": np.arange(3.0, dtype=np.float32)}
    for _ in range(6):
        arrays["a"] = arrays["a"] + 7
        tensors = uploader.upload(arrays, out=out)
        assert tensors["a"].tolist() == arrays["a"].tolist() and tensors["b"].tolist() == [0, 1, 2]
    assert tensors["a"].data_ptr() == out.data_ptr()
    assert tensors["b"].data_ptr() == out.data_ptr() + 32
    with pytest.raises(ValueError, match="80 bytes"):
        uploader.upload({"long": np.arange(20, dtype=np.int32)}, out=out)


@pytest.mark.gpu
def test_upload_reuses_buffers_safely() -> None:
    uploader, rng = Uploader(torch.device("cuda"), depth=2), np.random.default_rng(0)
    kept = []
    for step in range(50):
        arrays = {
            "ints": rng.integers(0, 99, size=step % 7).astype(np.int32),
            "longs": rng.integers(0, 99, size=(step, 2)),
            "floats": rng.random(5 * step % 11).astype(np.float32),
        }
        kept.append((arrays, uploader.upload(arrays)))
    for arrays, tensors in kept:
        for name, array in arrays.items():
            assert np.array_equal(tensors[name].cpu().numpy(), array)
