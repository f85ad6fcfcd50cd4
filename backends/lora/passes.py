"""Several batches in one step, for rows with more than one adapter.

A batch names each row once, so no two of its segments add to one row of y. A row with k adapters is
in k batches, which run one after the other on the same x and y.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from loraplex.backends.lora.contract import LoRABatch, LoRAGroup, LoRAKernels, LoRAOp, LoRATable


@dataclass(slots=True)
class LoRAPassesPlan:
    """A LoRAPlan of several batches. `kind` and `family` are the first one's."""

    plans: list[Any]
    x: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # of the last shrink

    @property
    def kind(self) -> str:
        kind: str = self.plans[0].kind
        return kind

    @property
    def family(self) -> str:
        family: str = self.plans[0].family
        return family


class LoRAPasses(LoRAKernels[LoRAPassesPlan]):
    """Runs the passes of a step by one op. Rows of y are rounded once a pass."""

    def __init__(self, op: LoRAOp[Any]) -> None:
        self._op = op

    def plan(self, *, table: LoRATable, batches: list[LoRABatch]) -> LoRAPassesPlan:
        return LoRAPassesPlan([self._op.plan(table=table, batch=batch) for batch in batches])

    def shrink(
        self,
        plan: LoRAPassesPlan,
        *,
        x: torch.Tensor,
        pool: torch.Tensor,
        layer: int,
        group: LoRAGroup,
    ) -> None:
        plan.x = x
        self._op.shrink(plan.plans[0], x=x, pool=pool, layer=layer, group=group)

    def expand(
        self,
        plan: LoRAPassesPlan,
        *,
        y: torch.Tensor,
        pool: torch.Tensor,
        layer: int,
        group: LoRAGroup,
    ) -> None:
        first, *others = plan.plans
        self._op.expand(first, y=y, pool=pool, layer=layer, group=group)
        for other in others:
            self._op.shrink(other, x=plan.x, pool=pool, layer=layer, group=group)
            self._op.expand(other, y=y, pool=pool, layer=layer, group=group)
