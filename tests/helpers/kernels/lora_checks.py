"""Compares an op ``lora`` with the fp32 loop.

NaN poisons what must not be read: rows without an adapter and rows beyond the batch, in x and y,
and all of the pool that is no weight.
"""

from typing import Any

import torch

from loraplex.backends.lora.contract import apply_lora

from helpers.kernels.lora_cases import LoRACase, make_batch
from helpers.kernels.oracles import lora_oracle

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
NUM_PADDED = 3
NAN = float("nan")


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def make_inputs(
    case: LoRACase, group: Any, slots: list[int], num_rows: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns x, and a buffer whose [:-2, :-8] is y. What lies beside y must not change."""
    device, dtype = case.pool.device, case.pool.dtype
    generator = torch.Generator(device).manual_seed(seed)
    width = sum(group.out_features)
    is_base = torch.tensor([slot < 0 for slot in slots], dtype=torch.bool, device=device)
    x = torch.full((num_rows, group.in_features), NAN, dtype=dtype, device=device)
    buffer = torch.full((num_rows + 2, width + 8), NAN, dtype=dtype, device=device)
    for tensor, columns in ((x, group.in_features), (buffer, width)):
        shape = (len(slots), columns)
        tensor[: len(slots), :columns] = torch.randn(shape, generator=generator, device=device)
        tensor[: len(slots)][is_base] = NAN
    return x, buffer


def apply(op: Any, plan: Any, case: LoRACase, layer: int, group: Any, x: Any, buffer: Any) -> Any:
    """Returns a copy of `buffer` to whose y the op has added."""
    target = buffer.clone()
    apply_lora(op, plan, y=target[:-2, :-8], x=x, pool=case.pool, layer=layer, group=group)
    return target


def check(
    op: Any, case: LoRACase, slots: list[int], num_padded: int = NUM_PADDED, plan: Any = None
) -> None:
    """Plan a batch, unless `plan` is one of it, and check every layer and group."""
    plan = plan or op.plan(table=case.table, batch=make_batch(slots))
    pool_before = case.pool.clone()
    for layer in range(case.pool.shape[0]):
        for group in case.groups:
            check_group(op, plan, case, slots, layer, group, num_padded)
    assert torch.equal(as_bits(case.pool), as_bits(pool_before))


def check_group(
    op: Any,
    plan: Any,
    case: LoRACase,
    slots: list[int],
    layer: int,
    group: Any,
    num_padded: int = NUM_PADDED,
) -> None:
    x, buffer = make_inputs(case, group, slots, len(slots) + num_padded, seed=layer)
    first, second = (apply(op, plan, case, layer, group, x, buffer) for _ in range(2))
    assert torch.equal(as_bits(first), as_bits(second)), "two runs differ"
    compare(first, buffer, x, case, slots, layer, group)


def compare(
    got: torch.Tensor,
    buffer: torch.Tensor,
    x: torch.Tensor,
    case: LoRACase,
    slots: list[int],
    layer: int,
    group: Any,
) -> None:
    weights = case.of_layer(layer)
    want = lora_oracle(buffer, x, group, slots, weights)
    is_same = as_bits(got) == as_bits(buffer)
    touched = torch.zeros_like(is_same)
    of_row = torch.tensor(slots, device=got.device)
    columns = zip(group.modules, group.out_starts, group.out_features, strict=True)
    for module, start, width in columns:
        named = [slot for slot, m in weights if m == module]
        rows = torch.isin(of_row, torch.tensor(named, device=got.device, dtype=of_row.dtype))
        touched[: len(slots), start : start + width] = rows[:, None]
    assert (is_same | touched).all(), f"layer {layer}, modules {group.modules}: strays"
    if touched.any():
        difference, norm = (got.float() - want)[touched].norm(), want[touched].norm()
        error = difference / norm
        assert error < TOLERANCE[case.pool.dtype], f"layer {layer}, {group.modules}: {error}"
