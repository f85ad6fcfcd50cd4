"""CUDA graphs without CUDA: what is recorded is run again, and its own memory spoiled after it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loraplex.backends.attention.contract import AttentionBatch
from loraplex.backends.attention.torch_sdpa import TorchAttention
from loraplex.backends.lora.contract import LoRABatch
from loraplex.backends.lora.torch_bmm import TorchLoRA
from loraplex.engine.worker import model_runner


class _NewTensors(TorchDispatchMode):
    """Collects the floating-point tensors that operators allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value, declared in zip(
            result if isinstance(result, tuple | list) else (result,), func._schema.returns,
            strict=False,
        ):  # fmt: skip
            is_new = isinstance(value, torch.Tensor) and declared.alias_info is None
            if is_new and value.is_floating_point():
                self.tensors.append(value)
        return result


class FakeRecorder:
    """Full after `capacity` graphs. A replay runs the recorded callable, then fills with NaN what
    that allocated: another graph of the same memory pool may do as much."""

    def __init__(self, capacity: int = 1 << 30) -> None:
        self.capacity = capacity
        self.num_recorded = 0
        self.num_warmed_up = 0
        self.num_spoiled = 0

    @property
    def is_full(self) -> bool:
        return self.num_recorded >= self.capacity

    def record(self, run: Callable[[], None], *, warm_up: bool) -> Callable[[], None]:
        if warm_up:
            run()
            self.num_warmed_up += 1
        self.num_recorded += 1

        def replay() -> None:
            with _NewTensors() as new:
                run()
            for tensor in new.tensors:
                tensor.fill_(torch.nan)
            self.num_spoiled += len(new.tensors)

        return replay

    def finish(self) -> str:
        return "for nothing"


def allow_graphs(monkeypatch: pytest.MonkeyPatch, recorder: FakeRecorder) -> None:
    """Make the CPU's backends such as graphs may be made of; LoRA has the kinds one and several,
    by the number of adapters in a step, and asserts that it is planned as it said; attention, that
    it is given the tokens that it planned for."""

    num_planned = [0]

    def plan_graph(self: TorchAttention, batch: AttentionBatch, num_rows: int) -> None:
        padding = num_rows - len(batch.query_lens)
        ones = np.ones(padding, dtype=np.int32)
        self.plan(
            AttentionBatch(
                np.concatenate((batch.query_lens, ones)), np.concatenate((batch.kv_lens, ones)),
                num_rows, np.pad(batch.page_table, ((0, padding), (0, 0))),
            )
        )  # fmt: skip

    def kind_of(self: TorchLoRA, *, table: Any, batch: LoRABatch) -> str:
        return "one" if len(batch.segment_slots) == 1 else "several"

    plan_lora, plan_attention, attend = TorchLoRA.plan, TorchAttention.plan, TorchAttention.run

    def checked_plan(
        self: TorchLoRA, *, table: Any, batch: LoRABatch, kind: str | None = None
    ) -> None:
        assert batch.is_empty or kind in (None, self.kind_of(table=table, batch=batch))
        plan_lora(self, table=table, batch=batch, kind=kind)

    def counting_plan(self: TorchAttention, batch: AttentionBatch) -> None:
        num_planned[0] = int(batch.query_lens.sum())
        plan_attention(self, batch)

    def checked_run(
        self: TorchAttention, *, q: torch.Tensor, kv: torch.Tensor, out: torch.Tensor
    ) -> None:
        assert len(q) == len(out) == num_planned[0]
        attend(self, q=q, kv=kv, out=out)

    monkeypatch.setattr(TorchAttention, "supports_graphs", True)
    monkeypatch.setattr(TorchAttention, "plan_graph", plan_graph)
    monkeypatch.setattr(TorchLoRA, "graph_kinds", ("one", "several"))
    monkeypatch.setattr(TorchLoRA, "max_graph_rows", 512)
    monkeypatch.setattr(TorchLoRA, "kind_of", kind_of)
    monkeypatch.setattr(TorchLoRA, "plan", checked_plan)
    monkeypatch.setattr(TorchAttention, "plan", counting_plan)
    monkeypatch.setattr(TorchAttention, "run", checked_run)
    monkeypatch.setattr(model_runner, "GraphRecorder", lambda device, config: recorder)
