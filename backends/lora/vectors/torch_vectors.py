"""The vectors of adapters in PyTorch, for CPUs."""

from dataclasses import dataclass

import numpy as np
import torch

from loraplex.backends.lora.contract import LoRAGroup, LoRATable
from loraplex.backends.lora.vectors.contract import VectorRows


@dataclass(frozen=True, slots=True)
class SlotRows:
    """The rows of one adapter and the places of its vectors."""

    rows: torch.Tensor  # int64 [n]
    pages: torch.Tensor  # int64 [pages of an adapter]
    starts: torch.Tensor  # int32 [gain | shift, layers, modules]


class TorchVectors:
    """VectorKernels. Its graph plan is one object that the next `plan_graph` changes."""

    def __init__(self) -> None:
        self._static: list[SlotRows] = []

    def plan(self, table: LoRATable, rows: VectorRows) -> list[SlotRows]:
        device = table.page_table.device
        starts = torch.stack((table.host_gain_start, table.host_shift_start))
        return [
            SlotRows(
                rows=torch.from_numpy(rows.rows[rows.slots == slot].astype(np.int64)).to(device),
                pages=table.page_table[slot].long(),
                starts=starts[..., slot],
            )
            for slot in np.unique(rows.slots).tolist()
        ]

    def plan_graph(self, table: LoRATable, rows: VectorRows) -> list[SlotRows]:
        self._static[:] = self.plan(table, rows)
        return self._static

    def apply(
        self,
        plan: list[SlotRows],
        *,
        y: torch.Tensor,
        pool: torch.Tensor,
        layer: int,
        group: LoRAGroup,
    ) -> None:
        places = zip(group.modules, group.out_starts, group.out_features, strict=True)
        for module, column, width in places:
            columns = y[:, column : column + width]
            for part in plan:
                gain_at, shift_at = part.starts[:, layer, module].tolist()
                if not gain_at and not shift_at:
                    continue
                values = columns.index_select(0, part.rows).float()
                if gain_at:
                    values *= _read(pool[layer], part.pages, gain_at, width, group)
                if shift_at:
                    values += _read(pool[layer], part.pages, shift_at, width, group)
                columns.index_copy_(0, part.rows, values.to(y.dtype))


def _read(
    pool_layer: torch.Tensor, pages: torch.Tensor, start: int, width: int, group: LoRAGroup
) -> torch.Tensor:
    """Returns a vector, float32 [width]: the sum of its two rows."""
    page_elems = pool_layer.shape[1]
    first = torch.tensor([[start], [start + group.row_stride(width)]], device=pages.device)
    at = first + torch.arange(width, device=pages.device)
    return pool_layer[pages[at // page_elems], at % page_elems].float().sum(dim=0)
