"""The layout of the table's fields on the device."""

import torch

from loraplex.backends.lora.table_fields import make_fields


def test_an_adapters_layer_is_one_line_of_the_l2_cache() -> None:
    num_layers, num_modules, num_slots = 3, 7, 5
    fields = make_fields(num_layers, num_modules, num_slots, "cpu")
    assert fields.shape == (4, num_layers, num_modules, num_slots) and not fields.any()
    flat = torch.arange(fields.untyped_storage().nbytes() // 4, dtype=torch.int32)
    entries = flat.as_strided(fields.shape, fields.stride())  # where each entry lies, in int32s
    assert len(entries.unique()) == entries.numel()
    lines = entries // 32
    assert (lines == lines[:1, :, :1]).all()
    assert len(lines.unique()) == num_layers * num_slots
    assert (entries.diff(dim=2) == 1).all()  # kernels know the stride of modules
