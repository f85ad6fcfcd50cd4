"""A graph is captured while another thread page-locks host memory, as the adapter loader does."""

import threading

import pytest
import torch

from loraplex.engine.config import GraphConfig
from loraplex.engine.worker.graphs.capture import GraphRecorder
from loraplex.memory.host.slab import shared_slab

pytestmark = pytest.mark.gpu

NUM_GRAPHS = 200


def test_page_locking_does_not_spoil_a_capture():
    device = torch.device("cuda")
    stop = threading.Event()
    num_locked = 0

    def lock() -> None:
        nonlocal num_locked
        while not stop.is_set():
            shared_slab(32 << 20, page_locked=True)
            num_locked += 1

    x = torch.randn(64, 512, device=device, dtype=torch.bfloat16)
    weight = torch.randn(512, 512, device=device, dtype=torch.bfloat16)
    out = torch.empty(64, 512, device=device, dtype=torch.bfloat16)
    torch.matmul(x, weight, out=out)  # sets cuBLAS up, which no capture allows
    recorder = GraphRecorder(device, GraphConfig())
    thread = threading.Thread(target=lock)
    thread.start()
    try:
        for _ in range(NUM_GRAPHS):
            replay = recorder.record(lambda: torch.matmul(x, weight, out=out), warm_up=False)
    finally:
        stop.set()
        thread.join()
    out.zero_()
    replay()
    torch.testing.assert_close(out, x @ weight)
    assert num_locked
