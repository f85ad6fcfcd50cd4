"""Op ``collective`` over gloo, in real processes: every rank gets the float32 sum, bit for bit."""

import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from helpers.running.collective_ranks import EPS, SIZES, inputs, run_rank


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_gets_the_same_right_sums(world_size: int, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(run_rank, args=(world_size, port, str(tmp_path)), nprocs=world_size, join=True)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world_size)]
    for case, (rows, hidden) in enumerate(SIZES):
        parts = [inputs(rank, rows, hidden) for rank in range(world_size)]
        total = sum(part.double() for part in parts)
        weight = torch.linspace(0.5, 1.5, hidden).double()
        embedded, residual, first, second, gathered = ranks[0][case]
        torch.testing.assert_close(embedded.double(), total, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(residual.double(), 3 * total, atol=1e-5, rtol=1e-5)
        for normed, before in ((first, 2 * total), (second, 3 * total)):
            scale = torch.rsqrt(before.square().mean(-1, keepdim=True) + EPS)
            torch.testing.assert_close(
                normed.double(), before * scale * weight, atol=1e-5, rtol=1e-4
            )
        assert torch.equal(gathered, torch.cat(parts, dim=1))
        for other in ranks[1:]:
            assert all(map(torch.equal, ranks[0][case], other[case]))
