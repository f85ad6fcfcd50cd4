"""CUDA graphs without CUDA: a replay runs the recorded callable again, then spoils its memory."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loraplex.backends.attention import torch_sdpa
from loraplex.backends.attention.contract import AttentionBatch, AttentionSpec
from loraplex.backends.attention.torch_sdpa import TorchAttention
from loraplex.backends.lora import torch_bmm
from loraplex.backends.lora.contract import LoRABatch, LoRASpec, LoRATable
from loraplex.backends.lora.torch_bmm import TorchLoRA, TorchLoRAPlan
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
    """Stands in for GraphRecorder; full after `capacity` graphs.

    A replay runs the recorded callable, then fills with NaN what it allocated, as another graph of
    the same memory pool may do.
    """

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


@dataclass
class CountedPlan:
    """TorchAttention's plan and the tokens that it is for."""

    decodes: list[Any] = field(default_factory=list)
    prefills: list[Any] = field(default_factory=list)
    num_tokens: int = 0


class GraphedAttention(TorchAttention):
    """TorchAttention with graph plans: each overwrites the one object that recorded runs hold.

    It asserts that it runs on as many tokens as it planned for.
    """

    supports_graphs = True

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        self._static = CountedPlan()

    def plan(self, batch: AttentionBatch) -> CountedPlan:  # type: ignore[override]
        plan = super().plan(batch)
        return CountedPlan(plan.decodes, plan.prefills, int(batch.query_lens.sum()))

    def plan_graph(self, batch: AttentionBatch, num_rows: int) -> CountedPlan:  # type: ignore[override]
        padding = num_rows - len(batch.query_lens)
        ones = np.ones(padding, dtype=np.int32)
        padded = AttentionBatch(
            np.concatenate((batch.query_lens, ones)), np.concatenate((batch.kv_lens, ones)),
            num_rows, np.pad(batch.page_table, ((0, padding), (0, 0))),
        )  # fmt: skip
        self._static.__dict__.update(self.plan(padded).__dict__)
        return self._static

    def run(self, plan: Any, *, q: torch.Tensor, kv: torch.Tensor, out: torch.Tensor) -> None:
        assert len(q) == len(out) == plan.num_tokens
        super().run(plan, q=q, kv=kv, out=out)


class GraphedLoRA(TorchLoRA):
    """TorchLoRA with the kinds one and several, by the number of adapters in a step.

    Each graph plan overwrites the one object of its kind that recorded runs hold. It asserts that
    a batch is planned with the kind that the op names.
    """

    graph_kinds = ("one", "several")
    max_graph_rows = 512

    def __init__(self, spec: LoRASpec) -> None:
        super().__init__(spec)
        self._static = {kind: TorchLoRAPlan([], kind=kind) for kind in self.graph_kinds}

    def kind_of(self, *, table: LoRATable, batch: LoRABatch) -> str:
        return "one" if len(batch.segment_slots) == 1 else "several"

    def plan_graph(self, *, table: LoRATable, batch: LoRABatch, kind: str) -> TorchLoRAPlan:
        assert batch.is_empty or kind == self.kind_of(table=table, batch=batch)
        self._static[kind].layers = self.plan(table=table, batch=batch).layers
        return self._static[kind]


def allow_graphs(monkeypatch: pytest.MonkeyPatch, recorder: FakeRecorder) -> None:
    """Let the CPU's backends be captured, by `recorder`."""
    monkeypatch.setattr(torch_sdpa, "TorchAttention", GraphedAttention)
    monkeypatch.setattr(torch_bmm, "TorchLoRA", GraphedLoRA)
    monkeypatch.setattr(model_runner, "GraphRecorder", lambda device, config: recorder)
