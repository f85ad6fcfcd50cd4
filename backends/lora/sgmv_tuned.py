"""Written by benchmarks/tune_sgmv.py: block sizes that measured best.

By compute capability: (kernel, regime, rank class, features, sizes as in sgmv_blocks.py).
"""

from typing import Any

TUNED: dict[tuple[int, int], tuple[tuple[Any, ...], ...]] = {}
