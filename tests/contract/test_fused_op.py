"""Every backend of op ``fused`` against float64 loops."""

from typing import Any

import numpy as np
import pytest
import torch

from loraplex.backends import registry

from helpers.kernels.fused_cases import draw_values, make_fused, rms_norm_oracle, rope_oracle

NAMES = [backend.name for backend in registry.list_backends("fused")]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SENTINEL = 7.0
EPS = 1e-5


def make_op(name: str, dtype: torch.dtype, device: str, head_dim: int = 64) -> Any:
    op, reason = make_fused(name, dtype, device, head_dim)
    if reason is not None:
        pytest.skip(reason)
    return op


def make_rows(
    rows: int, width: int, dtype: torch.dtype, device: str, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns random rows [rows, width], and the buffer of sentinels that they are a view of."""
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 2
    buffer = torch.full((rows + 1, width + 32), SENTINEL, dtype=dtype)
    buffer[:rows, :width] = values
    buffer = buffer.to(device)
    return buffer[:rows, :width], buffer


def assert_untouched(buffer: torch.Tensor, rows: int, width: int) -> None:
    assert (buffer[rows:] == SENTINEL).all() and (buffer[:, width:] == SENTINEL).all()


def check(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, largest: float = 0.25) -> None:
    """`largest` is the largest intermediate value whose rounding shows in a small result."""
    assert got.dtype == dtype and got.is_contiguous()
    limit = TOLERANCE[dtype]
    torch.testing.assert_close(got.double().cpu(), want, rtol=limit, atol=limit * largest)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("rows", "size"), [(1, 4096), (3, 576), (2, 18944), (33, 3584), (7, 48), (5, 77)]
)
@pytest.mark.parametrize("name", NAMES)
def test_norms(name: str, rows: int, size: int, dtype: torch.dtype, device: str) -> None:
    op = make_op(name, dtype, device)
    x, x_buffer = make_rows(rows, size, dtype, device, 1)
    residual, residual_buffer = make_rows(rows, size, dtype, device, 2)
    weight = (torch.randn(size, generator=torch.Generator().manual_seed(3)) + 1).to(dtype)
    before, total = x.clone(), (x.float() + residual.float()).to(dtype)
    check(op.rms_norm(x, weight.to(device), EPS), rms_norm_oracle(x.cpu(), weight, EPS), dtype)
    got = op.add_rms_norm(x, residual, weight.to(device), EPS)
    check(got, rms_norm_oracle(total.cpu(), weight, EPS), dtype)
    assert torch.equal(residual, total) and torch.equal(x, before)
    assert_untouched(x_buffer, rows, size)
    assert_untouched(residual_buffer, rows, size)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_norm_of_nothing_and_of_little(name: str, device: str) -> None:
    op = make_op(name, torch.float32, device)
    x = torch.tensor([[0.0] * 64, [1e-8] * 64, [1e9] * 64], device=device)
    weight = torch.ones(64)
    got = op.rms_norm(x, weight.to(device), EPS)
    check(got, rms_norm_oracle(x.cpu(), weight, EPS), torch.float32)
    assert (got[0] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 14336), (3, 1536), (2, 18944), (40, 1000), (5, 33)])
@pytest.mark.parametrize("name", NAMES)
def test_silu_mul(name: str, rows: int, size: int, dtype: torch.dtype, device: str) -> None:
    op = make_op(name, dtype, device)
    gate_up, buffer = make_rows(rows, 2 * size, dtype, device, 4)
    gate_up[0, :4] = torch.tensor([-100.0, 100.0, 0.0, -20.0], dtype=dtype)
    before = gate_up.clone()
    gate, up = before.cpu().double().chunk(2, dim=1)
    check(op.silu_mul(gate_up), gate / (1 + torch.exp(-gate)) * up, dtype)
    assert torch.equal(gate_up, before)
    assert_untouched(buffer, rows, 2 * size)


HEADS = [
    (64, 9, 3, False), (80, 4, 4, False), (96, 6, 1, True), (128, 32, 8, False),
    (128, 16, 8, True), (256, 3, 2, True), (16, 6, 2, True),
]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("head_dim", "num_heads", "num_kv_heads", "has_norm"), HEADS)
@pytest.mark.parametrize("name", NAMES)
def test_rope_store_kv(
    name: str, head_dim: int, num_heads: int, num_kv_heads: int, has_norm: bool,
    dtype: torch.dtype, device: str,
) -> None:  # fmt: skip
    op, block, num_tokens = make_op(name, dtype, device, head_dim), 4, 5
    width = (num_heads + 2 * num_kv_heads) * head_dim
    qkv, buffer = make_rows(num_tokens, width, dtype, device, 5)
    before = buffer.clone()
    kv = torch.full((6, 2, block, num_kv_heads, head_dim), SENTINEL, dtype=dtype, device=device)
    places = [(4, 3), (1, 0), (1, 1), (5, 2), (3, 3)]  # page, row
    kv_rows = torch.tensor([page * 2 * block + row for page, row in places], device=device)
    angles = torch.tensor([0.0, 1, 17, 4000, 131071])[:, None] * torch.rand(head_dim // 2)
    cos_sin = torch.cat((angles.double().cos(), angles.double().sin()), dim=1).float()
    norms = torch.rand(2, head_dim).to(dtype) + 0.5 if has_norm else [None, None]
    q = torch.empty(num_tokens, num_heads, head_dim, dtype=dtype, device=device)
    op.rope_store_kv(
        qkv=qkv, cos_sin=cos_sin.to(device), kv=kv, kv_rows=kv_rows, out=q, eps=EPS,
        **({"q_norm": norms[0].to(device), "k_norm": norms[1].to(device)} if has_norm else {}),
    )  # fmt: skip
    assert torch.equal(buffer, before)
    heads = qkv.cpu().unflatten(1, (-1, head_dim))
    want_q, want_k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    check(q, rope_oracle(want_q, angles.double(), norms[0], EPS), dtype, 2.0)
    got = torch.stack([kv[page, :, row] for page, row in places])
    want_k = rope_oracle(want_k, angles.double(), norms[1], EPS)
    check(got[:, 0].contiguous(), want_k, dtype, 2.0)
    assert torch.equal(got[:, 1].cpu(), v)
    for page, row in places:
        kv[page, :, row] = SENTINEL
    assert (kv == SENTINEL).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_padded_rows_all_go_to_the_null_page(name: str, device: str) -> None:
    op = make_op(name, torch.float32, device)
    qkv = torch.randn(40, 6 * 64, device=device)
    kv = torch.full((3, 2, 16, 2, 64), SENTINEL, device=device)
    kv_rows = torch.zeros(40, dtype=torch.int64, device=device)
    kv_rows[0] = 32 + 5
    cos_sin = torch.cat((torch.ones(40, 32), torch.zeros(40, 32)), dim=1).to(device)
    buffer = torch.full((41, 2, 64), SENTINEL, device=device)
    q = buffer[:40]
    op.rope_store_kv(qkv=qkv, cos_sin=cos_sin, kv=kv, kv_rows=kv_rows, out=q)
    heads = qkv.unflatten(1, (6, 64))
    assert (buffer[40] == SENTINEL).all()
    assert torch.equal(q, heads[:, :2])
    assert torch.equal(kv[1, 0, 5], heads[0, 2:4]) and torch.equal(kv[1, 1, 5], heads[0, 4:])
    kv[0, :, 0], kv[1, :, 5] = SENTINEL, SENTINEL
    assert (kv == SENTINEL).all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_beyond_32_bit_addresses(name: str) -> None:
    op = make_op(name, torch.float16, "cuda", 128)
    kv = torch.zeros(70_000, 2, 16, 8, 128, dtype=torch.float16, device="cuda")
    qkv = torch.randn(2, 24 * 128, device="cuda").half()
    kv_rows = torch.tensor([69_999 * 32 + 15, 3], device="cuda")
    cos_sin = torch.cat((torch.ones(2, 64), torch.zeros(2, 64)), dim=1).cuda()
    q = torch.empty(2, 8, 128, dtype=torch.float16, device="cuda")
    op.rope_store_kv(qkv=qkv, cos_sin=cos_sin, kv=kv, kv_rows=kv_rows, out=q)
    heads = qkv.unflatten(1, (24, 128))
    assert torch.equal(kv[69_999, :, 15], heads[0, 8:].unflatten(0, (2, 8)))
    assert torch.equal(kv[0, :, 3], heads[1, 8:].unflatten(0, (2, 8)))
    assert int(kv.count_nonzero(dim=(1, 2, 3, 4)).count_nonzero()) == 2


def make_draw(
    num_rows: int, vocab_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    logits = (torch.randn(num_rows, vocab_size, generator=generator) * 2).to(dtype)
    temperature = torch.tensor([0.0, 1.0, 0.3, 4.0])[torch.arange(num_rows) % 4]
    keys = torch.randint(0, 1 << 32, (num_rows, 2), generator=generator)
    return logits, temperature, keys


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
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
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
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
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
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
@pytest.mark.parametrize("name", NAMES)
def test_draw_does_not_depend_on_the_neighbours(name: str, device: str) -> None:
    """However a row is split, which depends on how many there are."""
    op = make_op(name, torch.float32, device)
    num_rows = 65 if device == "cpu" else 2200
    arrays = [array.to(device) for array in make_draw(num_rows, 5000, torch.float32)]
    together = op.draw(*arrays)
    for part in (slice(0, 1), slice(7, 9), slice(30, 46)):
        assert torch.equal(op.draw(*(array[part] for array in arrays)), together[part])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 64, 8192])
def test_graphs_replay_what_was_run(num_tokens: int, dtype: torch.dtype) -> None:
    """Llama-3-8B's sizes, new inputs in the captured buffers, bit for bit."""
    op = make_op("triton", dtype, "cuda", 128)
    num_rows, make = min(num_tokens, 64), lambda *s: torch.randn(*s, device="cuda").to(dtype)
    inputs = {
        "x": make(num_tokens, 4096), "residual": make(num_tokens, 4096), "weight": make(4096),
        "qkv": make(num_tokens, 48 * 128), "cos_sin": make(num_tokens, 128).float(),
        "gate_up": make(num_tokens, 2 * 14336), "logits": make(num_rows, 128256),
        "temperature": torch.arange(num_rows, device="cuda") % 3 / 2,
        "keys": torch.randint(0, 1 << 32, (num_rows, 2), device="cuda"),
    }  # fmt: skip
    kv = torch.zeros(600, 2, 16, 8, 128, dtype=dtype, device="cuda")
    token = torch.arange(num_tokens, device="cuda")
    kv_rows = (token // 16 + 1) * 32 + token % 16
    q = torch.empty(num_tokens, 32, 128, dtype=dtype, device="cuda")

    def run() -> list[torch.Tensor]:
        t = inputs
        op.rope_store_kv(qkv=t["qkv"], cos_sin=t["cos_sin"], kv=kv, kv_rows=kv_rows, out=q)
        return [
            op.rms_norm(t["x"], t["weight"], EPS),
            op.add_rms_norm(t["x"], t["residual"], t["weight"], EPS),
            t["residual"],
            q,
            kv,
            op.silu_mul(t["gate_up"]),
            op.draw(t["logits"], t["temperature"], t["keys"]),
        ]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in range(2):
        torch.manual_seed(seed)
        inputs["x"].normal_()
        inputs["residual"].normal_()
        inputs["logits"].normal_()
        inputs["qkv"].normal_()
        before = inputs["residual"].clone()
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        inputs["residual"].copy_(before)
        for got, want in zip(replayed, run(), strict=True):
            assert torch.equal(got, want)


def test_noise_of_the_oracle_is_gumbel() -> None:
    values = draw_values(torch.zeros(200_000), 1.0, [123, 1 << 31])
    assert abs(values.mean() - 0.57722) < 0.01 and abs(values.var() - np.pi**2 / 6) < 0.03
