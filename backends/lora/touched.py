"""Leaves out the launches of groups that no adapter of a batch touches, around any op ``lora``.

A launch without work takes 1 to 4 us (benchmarks/results/profile_h200.jsonl), and many adapters
touch the attention's projections alone. Eager steps launch what they need. Graphs are captured
twice: with all groups, and with the attention's alone.
"""

from dataclasses import dataclass
from typing import Any

import torch

from loraplex.backends.lora.contract import (
    LoRABatch,
    LoRAGroup,
    LoRAOp,
    LoRAPlan,
    LoRATable,
    check_graph_batch,
)
from loraplex.backends.lora.tiles import module_ranks

ATTENTION = " of attention"
"""Ends the kind of graphs without the launches of other groups."""


@dataclass(frozen=True, slots=True)
class TouchedPlan:
    """The inner op's plan, and the groups that are launched."""

    inner: LoRAPlan
    kind: str
    groups: frozenset[LoRAGroup]

    @property
    def family(self) -> str:
        return self.inner.family


class TouchedGroups:
    """An op ``lora`` that launches the touched groups only.

    A kind and the same kind for attention share the inner op's static buffers. So one graph plan of
    both together is alive at a time.
    """

    def __init__(
        self,
        op: LoRAOp[Any],
        *,
        groups: tuple[LoRAGroup, ...],
        attention: tuple[LoRAGroup, ...],
    ) -> None:
        """`attention` are those of `groups` that get graphs of their own."""
        self._op = op
        self._groups = groups
        self._attention = frozenset(attention)
        self.name = op.name
        self.graph_kinds = (*op.graph_kinds, *(kind + ATTENTION for kind in op.graph_kinds))
        self.max_graph_rows = op.max_graph_rows

    def kind_of(self, *, table: LoRATable, batch: LoRABatch) -> str:
        kind = self._op.kind_of(table=table, batch=batch)
        is_narrow = self._touched(table, batch) <= self._attention
        return kind + ATTENTION if is_narrow and self.graph_kinds else kind

    def plan(self, *, table: LoRATable, batch: LoRABatch) -> TouchedPlan:
        plan = self._op.plan(table=table, batch=batch)
        return TouchedPlan(plan, plan.kind, self._touched(table, batch))

    def plan_graph(self, *, table: LoRATable, batch: LoRABatch, kind: str) -> TouchedPlan:
        check_graph_batch(self, batch, kind)
        plan = self._op.plan_graph(table=table, batch=batch, kind=kind.removesuffix(ATTENTION))
        is_narrow = kind.endswith(ATTENTION)
        return TouchedPlan(plan, kind, self._attention if is_narrow else frozenset(self._groups))

    def shrink(
        self,
        plan: TouchedPlan,
        *,
        x: torch.Tensor,
        pool: torch.Tensor,
        layer: int,
        group: LoRAGroup,
    ) -> None:
        if group in plan.groups:
            self._op.shrink(plan.inner, x=x, pool=pool, layer=layer, group=group)

    def expand(
        self,
        plan: TouchedPlan,
        *,
        y: torch.Tensor,
        pool: torch.Tensor,
        layer: int,
        group: LoRAGroup,
    ) -> None:
        if group in plan.groups:
            self._op.expand(plan.inner, y=y, pool=pool, layer=layer, group=group)

    def _touched(self, table: LoRATable, batch: LoRABatch) -> frozenset[LoRAGroup]:
        """Returns the groups that an adapter of the batch touches in some layer."""
        ranks = module_ranks(table.host_rank.numpy(), batch.segment_slots)
        return frozenset(group for group in self._groups if ranks[list(group.modules)].any())
