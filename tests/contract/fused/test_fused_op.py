"""Every backend of op ``fused`` against float64 loops."""

from typing import Any

import pytest
import torch

from loraplex.backends import registry

from helpers.kernels.fused_cases import make_fused, rms_norm_oracle, rope_oracle

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
