"""The draws of every backend of op ``fused`` against a float64 loop."""

from typing import Any

import numpy as np
import pytest
import torch

from loraplex.backends import registry

from helpers.kernels.fused_cases import draw_values, make_fused

NAMES = [backend.name for backend in registry.list_backends("fused")]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make_op(name: str, dtype: torch.dtype, device: str) -> Any:
    op, reason = make_fused(name, dtype, device)
    if reason is not None:
        pytest.skip(reason)
    return op


def make_draw(
    num_rows: int, vocab_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    logits = (torch.randn(num_rows, vocab_size, generator=generator) * 2).to(dtype)
    temperature = torch.tensor([0.0, 1.0, 0.3, 4.0])[torch.arange(num_rows) % 4]
    keys = torch.randint(0, 1 << 32, (num_rows, 2), generator=generator)
    return logits, temperature, keys


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_rows", "vocab_size"), [(1, 50), (2, 32001), (3, 128256), (4, 1024), (40, 2050)]
)
@pytest.mark.parametrize("name", NAMES)
def test_draw(
    name: str, num_rows: int, vocab_size: int, dtype: torch.dtype, device: str
) -> None:  # fmt: skip
    op = make_op(name, dtype, device)
    logits, temperature, keys = make_draw(num_rows, vocab_size, dtype)
    padded = torch.full((num_rows, vocab_size + 16), 99.0, dtype=dtype)
    padded[:, :vocab_size] = logits
    view = padded.to(device)[:, :vocab_size]
    got = op.draw(view, temperature.to(device), keys.to(device))
    assert got.dtype == torch.int32 and got.shape == (num_rows,)
    for row, sampled in enumerate(got.tolist()):
        values = draw_values(logits[row], float(temperature[row]), keys[row].tolist())
        if temperature[row] == 0:
            assert sampled == int(values.argmax())  # NumPy promises the first of equals
        else:  # the rounding of float32 may decide between near equals
            assert values.max() - values[sampled] < 1e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_draw_takes_the_lowest_of_equals(name: str, dtype: torch.dtype, device: str) -> None:
    op = make_op(name, dtype, device)
    logits = torch.full((7, 5000), -3.0, dtype=dtype)
    logits[1, [4999, 1023, 1024]] = 2.5
    logits[2, [17, 4998, 3000]] = 65504.0
    logits[3, 1:] = -torch.inf
    logits[4, 3:] = -torch.inf
    logits[5], logits[5, 9], logits[5, 4000] = -1.0, -0.0, 0.0
    logits[6], logits[6, 4900] = -torch.inf, -1e4
    keys = torch.zeros(7, 2, dtype=torch.int64, device=device)
    got = op.draw(logits.to(device), torch.zeros(7, device=device), keys)
    assert got.tolist() == [0, 1023, 17, 0, 0, 9, 4900]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_draw_never_takes_what_is_forbidden(name: str, device: str) -> None:
    op = make_op(name, torch.float32, device)
    logits = torch.full((24, 3000), -torch.inf)
    logits[:, [5, 2999]] = torch.tensor([-1e4, -1e4 + 1])
    _, _, keys = make_draw(24, 8, torch.float32)
    got = op.draw(logits.to(device), torch.ones(24, device=device), keys.to(device))
    assert set(got.tolist()) == {5, 2999}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_draw_tells_broken_rows(name: str, dtype: torch.dtype, device: str) -> None:
    """Each kind of row once greedy and once random. Rows of finite values and -inf are not broken,
    however small the temperature."""
    op = make_op(name, dtype, device)
    size, nan, inf = 3000, torch.nan, torch.inf
    broken = [{0: nan}, {2999: nan}, {1500: -nan}, {7: inf}, {7: inf, 8: nan}, {9: nan, 2500: inf}]
    whole = [{}, {5: -inf}, {0: 60000.0}, dict.fromkeys(range(1, size), -inf)]
    rows = torch.randn(len(broken) + 1 + len(whole), size).to(dtype)
    rows[len(broken)] = -inf
    for row, marks in zip(rows, [*broken, {}, *whole], strict=True):
        for token_id, value in marks.items():
            row[token_id] = value
    num_broken = len(broken) + 1
    want = rows[num_broken:].argmax(dim=1).tolist()
    for heat in (0.0, 1e-36, 0.7, 90.0):
        temperature = torch.full((len(rows),), heat, device=device)
        keys = torch.arange(2 * len(rows), device=device).view(-1, 2)
        got = op.draw(rows.to(device), temperature, keys).tolist()
        assert got[:num_broken] == [-1] * num_broken
        assert min(got[num_broken:]) >= 0
        assert got[-1] == 0 and got[num_broken + 1] != 5
        if heat == 0:
            assert got[num_broken:] == want


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [31, 64, 5003])
@pytest.mark.parametrize("name", NAMES)
def test_draw_under_masks(name: str, vocab_size: int, dtype: torch.dtype, device: str) -> None:
    """Every other row has a mask; row 9's allows nothing, row 11 has a NaN that its mask excludes.
    The op is called without masks before and after, as the steps of an engine do."""
    op = make_op(name, dtype, device)
    logits, temperature, keys = make_draw(13, vocab_size, dtype)
    logits[11, 0] = torch.nan
    allowed = torch.rand(6, vocab_size, generator=torch.Generator().manual_seed(1)) < 0.3
    allowed[:, -1], allowed[4], allowed[5, 0] = True, False, False
    places = torch.full((13,), -1, dtype=torch.int32)
    places[1::2] = torch.tensor([3, 0, 5, 1, 4, 5], dtype=torch.int32)
    bits = np.zeros((6, -(-vocab_size // 32) * 32), dtype=np.uint8)
    bits[:, :vocab_size] = allowed
    masks = torch.from_numpy(np.packbits(bits, axis=1, bitorder="little").view(np.int32))
    arrays = [array.to(device) for array in (logits, temperature, keys)]
    before = arrays[0].clone()
    free = op.draw(*arrays)
    got = op.draw(*arrays, mask_places=places.to(device), masks=masks.to(device))
    assert torch.equal(op.draw(*arrays), free)
    assert torch.equal(arrays[0].nan_to_num(), before.nan_to_num()), "the logits were changed"
    assert torch.equal(got[::2], free[::2])
    assert got[[9, 11]].tolist() == [-1, -1]
    for row in (1, 3, 5, 7):
        values = draw_values(logits[row], float(temperature[row]), keys[row].tolist())
        values[~allowed[int(places[row])].numpy()] = -np.inf
        if temperature[row] == 0:
            assert got[row] == int(values.argmax())
        else:
            assert values.max() - values[int(got[row])] < 1e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_draw_does_not_depend_on_the_neighbours(name: str, device: str) -> None:
    """However a row is split, which depends on how many there are."""
    op = make_op(name, torch.float32, device)
    num_rows = 47 if device == "cpu" else 2200
    arrays = [array.to(device) for array in make_draw(num_rows, 5000, torch.float32)]
    together = op.draw(*arrays)
    for part in (slice(0, 1), slice(7, 9), slice(30, 46)):
        assert torch.equal(op.draw(*(array[part] for array in arrays)), together[part])


def test_noise_of_the_oracle_is_gumbel() -> None:
    values = draw_values(torch.zeros(200_000), 1.0, [123, 1 << 31])
    assert abs(values.mean() - 0.57722) < 0.01 and abs(values.var() - np.pi**2 / 6) < 0.03
