"""Cases for op ``lora``: adapters written to shuffled pages of a poisoned pool, and batches."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from loraplex.backends.lora.contract import (
    LoRABatch,
    LoRAGroup,
    LoRASpec,
    LoRATable,
)
from loraplex.backends.lora.table_fields import make_fields
from loraplex.memory.adapter_layout import (
    ROW_ALIGN,
    ModuleParts,
    ModuleShape,
    Segments,
    VectorName,
    num_pages,
    place_layer,
)

POPULARITIES = ("distinct", "uniform", "skewed", "identical", "base", "half-base")

LayerRanks = list[dict[int, int]]
Vectors = dict[tuple[int, int, int], tuple[torch.Tensor | float, torch.Tensor | float]]
Weights = dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor, float]]


def make_shapes(
    hidden: int, heads_width: int, kv_width: int, inner: int
) -> tuple[ModuleShape, ...]:
    return (
        ModuleShape(hidden, heads_width),
        ModuleShape(hidden, kv_width),
        ModuleShape(hidden, kv_width),
        ModuleShape(heads_width, hidden),
        ModuleShape(hidden, inner),
        ModuleShape(hidden, inner),
        ModuleShape(inner, hidden),
    )


def make_groups(shapes: tuple[ModuleShape, ...]) -> list[LoRAGroup]:
    groups = []
    for modules in ((0, 1, 2), (3,), (4, 5), (6,)):
        widths = tuple(shapes[m].out_features for m in modules)
        starts = tuple(sum(widths[:i]) for i in range(len(widths)))
        groups.append(LoRAGroup(modules, shapes[modules[0]].in_features, starts, widths, ROW_ALIGN))
    return groups


@dataclass
class LoRACase:
    """A pool with resident adapters. `weights` maps (layer, slot, module) to A, B and scale,
    `vectors` to gain and shift, 1 or 0 where there is none. A and B have `weight_dtype`, or the
    pool's dtype if it is None."""

    pool: torch.Tensor
    table: LoRATable
    shapes: tuple[ModuleShape, ...]
    groups: list[LoRAGroup]
    num_adapters: int
    weight_dtype: torch.dtype | None = None
    weights: Weights = field(default_factory=dict)
    vectors: Vectors = field(default_factory=dict)

    def of_layer(self, layer: int) -> dict[tuple[int, int], tuple[torch.Tensor, ...]]:
        return {(s, m): w for (at, s, m), w in self.weights.items() if at == layer}


def make_case(
    adapters: list[LayerRanks],
    shapes: tuple[ModuleShape, ...],
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    page_elems: int = 512,
    shuffle: bool = True,
    seed: int = 0,
    vectors: Sequence[tuple[VectorName, ...]] = (),
    weight_dtype: torch.dtype | None = None,
) -> LoRACase:
    """Put adapter i into slot 2 i + 1, on shuffled pages. All that is no weight is NaN.

    `vectors` are those of each adapter, on all its modules; () for none.
    """
    assert page_elems % ROW_ALIGN == 0
    generator = torch.Generator(device).manual_seed(seed)
    of_weights = weight_dtype or dtype
    packing, up = dtype.itemsize // of_weights.itemsize, 8.0 if weight_dtype else 1.0
    kinds = [*vectors, *[()] * (len(adapters) - len(vectors))]
    layouts = [
        [_place(ranks, shapes, kind, packing) for ranks in layers]
        for layers, kind in zip(adapters, kinds, strict=True)
    ]
    counts = [num_pages(max(used for _, used in of), page_elems) for of in layouts]
    total, num_layers = sum(counts) + 3, len(adapters[0]) if adapters else 1
    slots, most = 2 * len(adapters) + 2, max(counts, default=1)
    fields = {
        "page_table": torch.zeros(slots, most, dtype=torch.int32),
        "rank": torch.zeros(num_layers, len(shapes), slots, dtype=torch.int32),
        "a_start": torch.zeros(num_layers, len(shapes), slots, dtype=torch.int32),
        "b_start": torch.zeros(num_layers, len(shapes), slots, dtype=torch.int32),
        "scale": torch.zeros(num_layers, len(shapes), slots),
        "gain_start": torch.zeros(num_layers, len(shapes), slots, dtype=torch.int32),
        "shift_start": torch.zeros(num_layers, len(shapes), slots, dtype=torch.int32),
        "has_vectors": torch.zeros(slots, dtype=torch.bool),
    }
    pool = torch.empty((num_layers, total, page_elems), dtype=dtype, device=device)
    pool.view(torch.uint8).fill_(0xFF)  # NaN in every type
    order = torch.randperm(total - 1, generator=torch.Generator().manual_seed(seed)) + 1
    free = (order if shuffle else order.sort().values).tolist()
    weights: Weights = {}
    of_vectors: Vectors = {}

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    for index, (layers, count) in enumerate(zip(layouts, counts, strict=True)):
        slot, pages = 2 * index + 1, torch.tensor([free.pop() for _ in range(count)][::-1])
        fields["page_table"][slot, :count] = pages
        for layer, (segments, _) in enumerate(layers):
            for module in sorted({module for module, _ in segments}):
                shape = shapes[module]
                a_rows, b_rows = segments[module, "A"], segments[module, "B"]
                rank = a_rows.num_rows
                a = (random(rank, shape.in_features) * shape.in_features**-0.5 * up).to(of_weights)
                b = (random(shape.out_features, rank) * rank**-0.5 * up).to(of_weights)
                scale = (0.5 + slot % 3 + 0.25 * module) / up**2
                weights[layer, slot, module] = (a, b, scale)
                _write_rows(pool[layer], pages.to(device), a_rows.first, a, packing)
                _write_rows(pool[layer], pages.to(device), b_rows.first, b.T, packing)
                fields["rank"][layer, module, slot] = rank
                fields["a_start"][layer, module, slot] = a_rows.first
                fields["b_start"][layer, module, slot] = b_rows.first
                fields["scale"][layer, module, slot] = scale
                pair: dict[str, torch.Tensor | float] = {"gain": 1.0, "shift": 0.0}
                for name in kinds[index]:
                    rows = random(2, shape.out_features) * torch.tensor(
                        [[1.0], [0.01]], device=device
                    )
                    rows = rows.to(dtype)
                    _write_rows(pool[layer], pages.to(device), segments[module, name].start, rows)
                    pair[name] = rows.float().sum(0)
                    fields[f"{name}_start"][layer, module, slot] = segments[module, name].start
                    fields["has_vectors"][slot] = True
                if kinds[index]:
                    of_vectors[layer, slot, module] = (pair["gain"], pair["shift"])
    there = make_fields(num_layers, len(shapes), slots, device)  # a worker's layout
    names = ("rank", "a_start", "b_start", "scale")
    for view, name in zip(there, names, strict=True):
        view.copy_(fields[name].view(torch.int32))
    table = LoRATable(
        page_table=fields["page_table"].to(device),
        **dict(zip(names, (*there[:3], there[3].view(torch.float32)), strict=True)),
        gain_start=fields["gain_start"].to(device),
        shift_start=fields["shift_start"].to(device),
        **{f"host_{name}": value for name, value in fields.items()},
    )
    case = LoRACase(pool, table, shapes, make_groups(shapes), len(adapters), weight_dtype)
    case.weights, case.vectors = weights, of_vectors
    return case


def _place(
    ranks: dict[int, int],
    shapes: tuple[ModuleShape, ...],
    vectors: tuple[VectorName, ...],
    packing: int,
) -> tuple[Segments, int]:
    parts = {module: ModuleParts(rank, vectors) for module, rank in ranks.items()}
    return place_layer(parts, shapes, packing)


def _write_rows(
    layer: torch.Tensor, pages: torch.Tensor, start: int, rows: torch.Tensor, packing: int = 1
) -> None:
    if packing > 1:  # torch has no index_put for e4m3
        layer, rows = layer.view(torch.uint8), rows.contiguous().view(torch.uint8)
    page_elems, (count, width) = layer.shape[1], rows.shape
    row_align = ROW_ALIGN * packing
    stride = -(-width // row_align) * row_align
    first = start + torch.arange(count, device=layer.device)[:, None] * stride
    at = first + torch.arange(width, device=layer.device)
    layer[pages[at // page_elems], at % page_elems] = rows


def make_spec(case: LoRACase, max_num_tokens: int, max_rank: int = 256) -> LoRASpec:
    """Returns the spec of an op for this case."""
    return LoRASpec(
        max_num_tokens=max_num_tokens,
        max_rank=max_rank,
        dtype=case.pool.dtype,
        device=case.pool.device,
        page_elems=case.pool.shape[2],
        groups=tuple(case.groups),
        weight_dtype=case.weight_dtype,
    )


def draw_slots(popularity: str, num_rows: int, num_adapters: int, seed: int = 0) -> list[int]:
    """Returns the adapter slot of each row, in random order; -1 is the base model."""
    generator = torch.Generator().manual_seed(seed)
    if popularity == "base" or num_adapters == 0:
        return [-1] * num_rows
    if popularity == "distinct":
        which = torch.arange(num_rows) % num_adapters
    elif popularity == "uniform":
        which = torch.randint(0, num_adapters, (num_rows,), generator=generator)
    elif popularity == "identical":
        which = torch.full((num_rows,), num_adapters - 1)
    else:
        shares = 1.5 ** torch.arange(num_adapters).float()
        which = torch.multinomial(shares, num_rows, replacement=True, generator=generator)
    slots = 2 * which + 1
    if popularity == "half-base":
        slots[torch.rand(num_rows, generator=generator) < 0.5] = -1
    return slots[torch.randperm(num_rows, generator=generator)].tolist()


def make_batch(slots: list[int]) -> LoRABatch:
    """Returns the batch of these rows, by the contract and without code of the engine."""
    present = sorted({slot for slot in slots if slot >= 0})
    segments = [[row for row, slot in enumerate(slots) if slot == s] for s in present]
    starts = [0]
    for rows in segments:
        starts.append(starts[-1] + len(rows))
    return LoRABatch(
        num_tokens=len(slots),
        token_order=np.array([row for rows in segments for row in rows], dtype=np.int32),
        segment_starts=np.array(starts, dtype=np.int32),
        segment_slots=np.array(present, dtype=np.int32),
    )
