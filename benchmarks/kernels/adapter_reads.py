"""How long does it take a CPU to read, hash and pack an adapter whose file is in the page cache?

Rank 16 on all seven projections of Llama-3-8B, 84 MB in bfloat16, random weights. Prints one JSON
line with the shortest and the median of the repeats, for one packing thread and for two, and with
the median of the processor time, which other work on the machine disturbs less.

    python benchmarks/kernels/adapter_reads.py >> benchmarks/results/adapter_reads_cpu.jsonl
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

from loraplex.engine.adapters.peft_files import read_adapter
from loraplex.engine.adapters.target import AdapterTarget
from loraplex.engine.model.modules import llama_modules
from loraplex.engine.model.shard import whole_modules
from loraplex.memory.adapter_layout import ModuleShape

RANK, NUM_LAYERS = 16, 32
HIDDEN, KV, INNER = 4096, 1024, 14336
SHAPES = tuple(
    ModuleShape(*pair)
    for pair in ((HIDDEN, HIDDEN), (HIDDEN, KV), (HIDDEN, KV), (HIDDEN, HIDDEN), (HIDDEN, INNER),
                 (HIDDEN, INNER), (INNER, HIDDEN))
)  # fmt: skip


def write_adapter(folder: Path, dtype: torch.dtype) -> int:
    """Write an adapter of random weights. Returns the size of its file in bytes."""
    tensors = {}
    for layer in range(NUM_LAYERS):
        for module, shape in zip(llama_modules(), SHAPES, strict=True):
            key = f"base_model.model.{module.full_name(layer)}.lora_"
            tensors[f"{key}A.weight"] = torch.randn(RANK, shape.in_features).to(dtype)
            tensors[f"{key}B.weight"] = torch.randn(shape.out_features, RANK).to(dtype)
    path = folder / "adapter_model.safetensors"
    save_file(tensors, path)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return path.stat().st_size


def measure(
    folder: Path, target: AdapterTarget, num_threads: int, repeats: int
) -> list[tuple[float, float]]:
    """Returns, for each read into the same memory, its time and its processor time, in ms."""
    memory: dict[int, torch.Tensor] = {}

    def allocate(num_bytes: int) -> torch.Tensor:
        return memory.setdefault(num_bytes, torch.zeros(num_bytes, dtype=torch.uint8))

    times = []
    with ThreadPoolExecutor(num_threads) as packers:
        for _ in range(repeats + 1):  # the first fills the page cache
            start, cpu_start = time.perf_counter(), time.process_time()
            read_adapter("any", folder, target, allocate=allocate, packers=packers)
            cpu = (time.process_time() - cpu_start) * 1e3
            times.append(((time.perf_counter() - start) * 1e3, cpu))
    return times[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--variant", default="", help="what is measured, for the JSON line")
    parser.add_argument("--machine", default=f"{os.cpu_count()} cores", help="its description")
    options = parser.parse_args()
    torch.set_num_threads(1)
    target = AdapterTarget(
        NUM_LAYERS, whole_modules(SHAPES), 32 << 10, torch.bfloat16, max_rank=RANK
    )
    line = {
        "variant": options.variant,
        "machine": options.machine,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "repeats": options.repeats,
    }
    for dtype in (torch.bfloat16, torch.float32):
        with tempfile.TemporaryDirectory() as folder:
            name = str(dtype).removeprefix("torch.")
            line[f"{name}_file_bytes"] = write_adapter(Path(folder), dtype)
            for num_threads in (1, 2):
                pairs = measure(Path(folder), target, num_threads, options.repeats)
                times, cpu_times = zip(*pairs, strict=True)
                line[f"{name}_{num_threads}_threads_ms"] = {
                    "min": round(min(times), 2), "median": round(statistics.median(times), 2),
                    "cpu_median": round(statistics.median(cpu_times), 2),
                }  # fmt: skip
    print(json.dumps(line))


if __name__ == "__main__":
    main()
