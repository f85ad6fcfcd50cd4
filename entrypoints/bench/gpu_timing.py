"""Times GPU work in a CUDA graph, and the copy bandwidth to compare it with."""

import statistics
from collections.abc import Callable

import torch


def capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Capture the launches of `run` in a graph, after one run that warms it up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph


def time_graph(run: Callable[[], object], repeats: int) -> list[float]:
    """Microseconds of each of `repeats` replays of the launches of `run`."""
    graph = capture(run)
    for _ in range(3):
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1e3 for a, b in zip(events, events[1:], strict=False)]


def copy_bandwidth() -> float:
    """Bytes read plus bytes written, a second, by a large device-to-device copy."""
    source = torch.randn(1 << 30, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    times = time_graph(lambda: torch.mul(source, 1.0, out=target), 15)
    return 2 * source.numel() * 4 / (statistics.median(times) * 1e-6)
