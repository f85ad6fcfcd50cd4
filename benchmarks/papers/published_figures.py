"""Settings of the papers and the figures that they report, which are printed beside ours.

S-LoRA (arXiv 2311.03285): the result files that its authors publish for the paper's throughput
table (github.com/S-LoRA/S-LoRA, benchmarks/paper/synthetic/slora/*_a100-80_*_table.jsonl): one
A100 80GB, fp16, 10 requests/s offered for 120 s, alpha 1, cv 1, lengths U[8,512), adapters in
main memory from the start. Tokens per second are not reported.

S-LoRA over several GPUs, settings S5 and S6: the numbers in the script that draws the paper's
figure on tensor parallelism (github.com/S-LoRA/S-LoRA, benchmarks/plot/plot_tp.py), in requests/s
on two and four A100s: 40GB each for the 30B model, 80GB for the 70B one. It gives no rate and no
lengths.

Punica (arXiv 2310.18547), section 7.2: one A100 80GB, 1,000 requests with ShareGPT's lengths
(about 101k tokens generated), at most 32 at a time, rank 16 on all projections. One figure for all
popularities is in the text; whether prompt tokens count is not said, and its published benchmark
counts them.
"""

from typing import NamedTuple

SETTINGS = {
    "S1": ("llama-2-7b", (8,)),
    "S2": ("llama-2-7b", (64, 32, 16, 8)),
    "S4": ("llama-2-13b", (64, 32, 16)),
    "S5": ("llama-30b", (32,)),
    "S6": ("llama-2-70b", (64,)),
}
"""S-LoRA's base models and ranks; adapters are on q, k, v and o."""


class SLoraFigure(NamedTuple):
    """One row of S-LoRA's table. `attainment` is the share of first tokens within 6 s."""

    requests_per_s: float
    ttft_s_mean: float
    attainment: float


SLORA = {
    "S1": {
        5: SLoraFigure(8.05, 0.60, 1.0),
        100: SLoraFigure(7.99, 0.62, 1.0),
        1000: SLoraFigure(7.64, 1.90, 0.921),
        2000: SLoraFigure(7.61, 2.02, 0.899),
    },
    "S2": {
        5: SLoraFigure(7.48, 2.66, 0.765),
        100: SLoraFigure(7.29, 4.21, 0.65),
        1000: SLoraFigure(6.69, 10.54, 0.469),
        2000: SLoraFigure(6.73, 10.65, 0.448),
    },
    "S4": {
        2: SLoraFigure(4.49, 50.54, 0.178),
        5: SLoraFigure(4.43, 54.81, 0.133),
        100: SLoraFigure(4.28, 58.56, 0.137),
        1000: SLoraFigure(3.90, 72.07, 0.123),
    },
}
"""By setting and number of adapters."""

SLORA_NOTE = (
    "paper: S-LoRA's published results on one A100 80GB, 10 requests/s offered for 120 s; it "
    "reports no tokens/s. The hardware differs: compare the shape over n, not the level."
)


class SLoraRanksFigure(NamedTuple):
    """One pair of bars: with adapters, and of the base model alone on as many GPUs."""

    requests_per_s: float
    base_requests_per_s: float


SLORA_RANKS = {
    ("S5", 10, 2): SLoraRanksFigure(0.60, 1.21),
    ("S5", 10, 4): SLoraRanksFigure(3.29, 5.09),
    ("S5", 100, 2): SLoraRanksFigure(0.60, 1.31),
    ("S5", 100, 4): SLoraRanksFigure(2.73, 5.12),
    ("S6", 10, 2): SLoraRanksFigure(0.22, 0.60),
    ("S6", 10, 4): SLoraRanksFigure(1.81, 3.46),
}
"""By setting, number of adapters and number of GPUs."""

SLORA_RANKS_NOTE = (
    "paper: S-LoRA on as many A100s (40GB for S5, 80GB for S6), from the script of its figure on "
    "tensor parallelism. The hardware differs: compare the share of the base model."
)

PUNICA = {"llama-2-7b": 1044.0, "llama-2-13b": 693.0}
"""Tokens per second, every popularity."""

PUNICA_BASE = {"llama-2-7b": 1140.0, "llama-2-13b": 789.0}
"""Tokens per second of vLLM (of 2023) without adapters, by the same paper."""

PUNICA_NOTE = (
    "paper: Punica on one A100 80GB, 1,000 requests of ShareGPT's lengths, batch 32, the same "
    "figure for every popularity; base is the paper's vLLM without adapters. Lengths here are a "
    "stand-in (see docs/results.md) and the hardware differs: compare Distinct with Identical."
)
