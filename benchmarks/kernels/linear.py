"""Measures each backend of op ``linear`` at the shapes of a decoder, against the bytes floor.

A graph runs one product over many weights in turn, so that none is in the L2 cache. The floor
counts the weight in its own form, x and y once, over the copy bandwidth measured in the same run.
`quantize_rows` is the launch that rounds x where the layer before does not; `fused` is what norm
and SiLU take longer when they also write e4m3. Every product is checked against float32.

    python benchmarks/kernels/linear.py --out benchmarks/results/linear.jsonl
"""

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from loraplex.backends.fp8 import empty_rows, quantize
from loraplex.backends.fused.contract import FusedOps, FusedSpec
from loraplex.backends.linear.contract import FP8, PLAIN, LinearInput, LinearSpec, LinearWeight
from loraplex.backends.registry import BackendError, resolve
from loraplex.entrypoints.bench.gpu_timing import copy_bandwidth, time_graph

SHAPES = {
    "llama-2-7b": {"qkv": (12288, 4096), "o": (4096, 4096),
                   "gate_up": (22016, 4096), "down": (4096, 11008)},
    "llama-3-8b": {"qkv": (6144, 4096), "o": (4096, 4096),
                   "gate_up": (28672, 4096), "down": (4096, 14336)},
}  # fmt: skip
TOKENS = (1, 8, 32, 64, 128, 256, 512, 4096)
ROTATED_BYTES = 512 << 20
NUM_REPEATS = 20
FORMS = {"torch": PLAIN, "fp8": FP8}
LIMITS = {"torch": 0.01, "fp8": 0.08}
"""Largest mean error, of the mean magnitude of y. e4m3 has three bits of mantissa."""
EPS = 1e-5


def make_weights(name: str, size: tuple[int, int]) -> list[LinearWeight]:
    """Returns weights of together ROTATED_BYTES.

    Raises:
        BackendError: the backend cannot run here.
    """
    outs, ins = size
    device = torch.device("cuda", torch.cuda.current_device())
    spec = LinearSpec(torch.bfloat16, device, FORMS[name], (size,))
    op = resolve("linear", name, spec).make(spec)
    first = op.make_weight(outs, ins)
    weights = [first, *(op.make_weight(outs, ins) for _ in range(ROTATED_BYTES // first.nbytes))]
    generator = torch.Generator(device=device).manual_seed(0)
    for weight in weights:
        weight.write(
            slice(0, outs), lambda target: target.normal_(0.0, ins**-0.5, generator=generator)
        )
    return weights


def make_input(name: str, num_tokens: int, size: int) -> LinearInput:
    x = torch.randn(num_tokens, size, dtype=torch.bfloat16, device="cuda")
    if FORMS[name] == PLAIN:
        return LinearInput(x)
    fp8 = empty_rows(num_tokens, size, x.device)
    quantize(x, fp8)
    return LinearInput(x, fp8)


def check(name: str, weight: LinearWeight, x: LinearInput) -> float:
    """Returns the mean error of one product, of the mean magnitude.

    Raises:
        ArithmeticError: it is too large for numbers rounded to e4m3, or not a number.
    """
    want = x.x.float() @ weight.values(slice(None)).float().t()
    error = (weight.multiply(x, None).float() - want).abs().mean() / want.abs().mean()
    if not float(error) < LIMITS[name]:
        raise ArithmeticError(f"{name} is wrong by {float(error):.3f} of the mean magnitude")
    return float(error)


def measure(
    name: str, weights: list[LinearWeight], num_tokens: int, bandwidth: float
) -> dict[str, object]:
    outs, ins = weights[0].shape
    x = make_input(name, num_tokens, ins)
    error = check(name, weights[0], x)

    def run() -> None:
        for weight in weights:
            weight.multiply(x, None)

    times = [us / len(weights) for us in time_graph(run, NUM_REPEATS)]
    x_bytes = num_tokens * ins * (2 if FORMS[name] == PLAIN else 1)
    num_bytes = weights[0].nbytes + x_bytes + num_tokens * outs * 2
    us = statistics.median(times)
    floor_us = num_bytes / bandwidth * 1e6
    return {
        "backend": name,
        "us": round(us, 2),
        "us_min": round(min(times), 2),
        "floor_us": round(floor_us, 2),
        "of_floor": round(us / floor_us, 2),
        "TFLOP_s": round(2 * num_tokens * outs * ins / us / 1e6, 1),
        "error": round(error, 5),
    }


def rounding_calls(
    op: FusedOps, num_tokens: int, size: int
) -> dict[str, tuple[Callable[[], object], Callable[[], object] | None]]:
    """Returns by operator a call that writes e4m3, and the same without it if there is one."""
    x = torch.randn(num_tokens, size, dtype=torch.bfloat16, device="cuda")
    residual, gate_up = torch.randn_like(x), torch.cat((x, x), dim=1)
    weight = torch.ones(size, dtype=x.dtype, device="cuda")
    fp8 = empty_rows(num_tokens, size, x.device)
    return {
        "quantize_rows": (lambda: op.quantize_rows(x), None),
        "add_rms_norm": (
            lambda: op.add_rms_norm(x, residual, weight, EPS, fp8),
            lambda: op.add_rms_norm(x, residual, weight, EPS),
        ),
        "silu_mul": (lambda: op.silu_mul(gate_up, fp8), lambda: op.silu_mul(gate_up)),
    }


def measure_rounding(num_tokens: int, size: int) -> list[dict[str, object]]:
    device = torch.device("cuda", torch.cuda.current_device())
    spec = FusedSpec(dtype=torch.bfloat16, device=device, head_dim=128)
    op = resolve("fused", "auto", spec).make(spec)
    rows = []
    for name, calls in rounding_calls(op, num_tokens, size).items():
        medians = [
            statistics.median(time_graph(lambda call=call: repeat(call), NUM_REPEATS)) / 100
            for call in calls
            if call is not None
        ]
        rows.append({"op": name, "us": round(medians[0], 2)})
        if len(medians) > 1:
            rows[-1]["us_without"] = round(medians[1], 2)
    return rows


def repeat(call: Callable[[], object]) -> None:
    for _ in range(100):
        call()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", default=",".join(FORMS))
    parser.add_argument("--only", default="", help="part of a model's name")
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    options = parser.parse_args()
    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "copy_TB_s": round(bandwidth / 1e12, 3),
    }
    print(machine)

    def keep(row: dict[str, object]) -> None:
        print(" ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps({**machine, **row}) + "\n")

    for model, shapes in SHAPES.items():
        if options.only not in model:
            continue
        for projection, size in shapes.items():
            for name in options.backends.split(","):
                try:
                    weights = make_weights(name, size)
                except BackendError as error:
                    print(f"{name}: {error}")
                    continue
                for tokens in TOKENS:
                    what = {"model": model, "projection": projection, "num_tokens": tokens}
                    keep(what | measure(name, weights, tokens, bandwidth))
                del weights
                torch.cuda.empty_cache()
        for projection in ("qkv", "down"):
            size_in = shapes[projection][1]
            for tokens in (1, 64, 256, 4096):
                for row in measure_rounding(tokens, size_in):
                    keep({"model": model, "size": size_in, "num_tokens": tokens} | row)


if __name__ == "__main__":
    main()
