"""Written by benchmarks/kernels/tune_sgmv.py: the fastest measured block sizes.

By compute capability: (kernel, regime, rank class, features, sizes of blocks.py).
"""

from typing import Any

TUNED: dict[tuple[int, int], tuple[tuple[Any, ...], ...]] = {
    (9, 0): (
        ("shrink", "prefill", 16, 4096, (64, 64, 4, 6, 1)),
        ("shrink", "prefill", 16, 14336, (64, 64, 4, 6, 3)),
        ("expand", "prefill", 16, 4096, (64, 128, 16, 8, 128, 2, 16)),
        ("expand", "prefill", 16, 6144, (64, 128, 16, 4, 168, 4, 8)),
        ("expand", "prefill", 16, 28672, (64, 128, 16, 8, 128, 4, 8)),
        ("shrink", "prefill", 64, 4096, (128, 64, 8, 4, 1)),
        ("shrink", "prefill", 64, 14336, (64, 128, 8, 4, 2)),
        ("expand", "prefill", 64, 4096, (64, 128, 64, 8, 128, 2, 16)),
        ("expand", "prefill", 64, 6144, (64, 64, 64, 4, 168, 2, 16)),
        ("expand", "prefill", 64, 28672, (64, 128, 64, 8, 128, 2, 16)),
    ),
}
