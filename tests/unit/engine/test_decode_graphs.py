"""Which graph a step is given: never one that leaves out its adapters."""

import numpy as np
import pytest
import torch

from loraplex.backends.lora.contract import LoRABatch, LoRASpec
from loraplex.backends.lora.torch_bmm import TorchLoRA
from loraplex.engine.decode_graphs import BASE, DecodeGraphs


class TwoKinds:
    """Of a LoRA op, what the choice of a graph depends on."""

    graph_kinds = ("few", "many")
    max_graph_rows = 4

    def kind_of(self, batch: LoRABatch) -> str:
        return "few" if len(batch.segment_slots) < 3 else "many"


def make_batch(slots: list[int]) -> LoRABatch:
    used, counts = np.unique([slot for slot in slots if slot >= 0], return_counts=True)
    return LoRABatch(
        num_tokens=len(slots),
        token_order=np.argsort(slots, kind="stable")[slots.count(-1) :].astype(np.int32),
        segment_starts=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
        segment_slots=used.astype(np.int32),
    )


def make_graphs(lora, monkeypatch: pytest.MonkeyPatch) -> DecodeGraphs:
    """Captured with the ladder 1, 2, 4, 8; a graph is its own key."""
    graphs = DecodeGraphs(
        forward=lambda *args: None, attention=None, lora=lora, lora_table=None,
        logits=torch.zeros(8, 4),
    )  # fmt: skip
    monkeypatch.setattr(graphs, "_capture_one", lambda rows, kind, pool: (rows, kind))
    for rows in (8, 4, 2, 1):
        kinds = (*lora.graph_kinds, BASE) if rows <= lora.max_graph_rows else (BASE,)
        for kind in kinds:
            graphs._graphs[rows, kind] = graphs._capture_one(rows, kind, None)
        graphs._sizes.insert(0, rows)
    return graphs


@pytest.mark.parametrize("slots", [[5], [-1, 3], [0, 0, 0], [1, -1, 2, 3], [7] * 8])
def test_an_op_that_is_never_captured_gets_no_graph(slots, monkeypatch) -> None:
    cpu = torch.device("cpu")
    lora = TorchLoRA(LoRASpec(8, 16, torch.float32, cpu, 64, ()))
    graphs = make_graphs(lora, monkeypatch)
    assert graphs.fit(len(slots), graphs.kind_of(make_batch(slots))) == 0
    base = [-1] * len(slots)
    size = graphs.fit(len(slots), graphs.kind_of(make_batch(base)))
    assert size >= len(slots) and graphs._graphs[size, BASE]


def test_a_graph_of_the_steps_kind(monkeypatch) -> None:
    graphs = make_graphs(TwoKinds(), monkeypatch)
    for slots, kind, size in (
        ([-1, -1, -1], BASE, 4), ([-1] * 6, BASE, 8), ([2], "few", 1), ([2, 2, -1], "few", 4),
        ([0, 1, 2], "many", 4), ([2] * 5, "few", 0), ([-1] * 9, BASE, 0),
    ):  # fmt: skip
        batch = make_batch(slots)
        assert graphs.kind_of(batch) == kind
        assert graphs.fit(len(slots), kind) == size
