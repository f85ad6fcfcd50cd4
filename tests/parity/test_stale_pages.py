"""KV that is not finite in freed pages does not reach the next request that gets them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.backends import registry
from loraplex.backends.config import BackendConfig
from loraplex.engine.config import EngineConfig, GraphConfig, ModelConfig
from loraplex.engine.worker.worker import Worker
from loraplex.memory.config import MemoryConfig
from loraplex.scheduler.config import SchedulerConfig

from helpers.models.hf_models import make_hf_model
from helpers.models.peft_adapters import make_adapter
from helpers.running.step_driver import Sequence, StepDriver

SIZES = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
         "intermediate_size": 1024}  # fmt: skip
BLOCK, MAX_SEQS, NUM_NEW = 16, 16, 20
LENGTHS = (1, 7, 15, 16, 17, 33, 70, 130)
GPU = pytest.mark.gpu
SETUPS = [
    ("cpu", "torch", True, "auto"),
    ("cpu", "torch", True, "fp8"),
    pytest.param("cuda", "torch", True, "auto", marks=GPU),
    pytest.param("cuda", "xformers", True, "auto", marks=GPU),
    pytest.param("cuda", "flashinfer", True, "auto", marks=GPU),
    pytest.param("cuda", "flashinfer", False, "auto", marks=GPU),  # in graphs
    pytest.param("cuda", "flashinfer", False, "fp8", marks=GPU),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stale")
    model = make_hf_model("llama3", root / "base", seed=3, **SIZES)
    make_adapter(model, root / "a", r=8, alpha=16, targets="all-linear", seed=1, strength=0.3)
    return root


def make_worker(root: Path, device: str, attention: str, is_eager: bool, kv_dtype: str) -> Worker:
    lora = "torch" if attention == "torch" else "auto"
    return Worker(
        EngineConfig(
            model=ModelConfig(
                model=str(root / "base"),
                device=device,
                dtype="bfloat16" if device == "cuda" else "float32",
            ),
            memory=MemoryConfig(
                block_tokens=BLOCK, num_pages=240, max_adapter_slots=2, kv_cache_dtype=kv_dtype
            ),
            scheduler=SchedulerConfig(max_num_seqs=MAX_SEQS, max_num_batched_tokens=512),
            backend=BackendConfig(attention_backend=attention, lora_backend=lora),
            graph=GraphConfig(enforce_eager=is_eager),
        )
    )


@torch.inference_mode()
def spoil(worker: Worker, value: float) -> None:
    """Fill every page with `value`, but for the null page, which no request owns.

    Seen as e4m3, one byte of such a float32 is NaN, and one of such a bfloat16.
    """
    worker.parts.pool.pages[:, 1:] = value


def answer(root: Path, worker: Worker) -> tuple[list[Any], set[str]]:
    """Returns tokens and logprobs of requests with and without adapter, and how steps ran.

    Prompts run in chunks, and one request is preempted, so pages are used twice.
    """
    driver = StepDriver(worker, block_tokens=BLOCK, max_num_seqs=MAX_SEQS)
    slots = (-1, driver.load("a", root / "a"))
    generator = torch.Generator().manual_seed(5)
    sequences = [
        Sequence(
            torch.randint(3, 512, (length,), generator=generator).tolist(),
            slots[index % 2],
            {"num_logprobs": 2},
        )
        for index, length in enumerate(LENGTHS)
    ]
    kernels: set[str] = set()
    for number in range(200):
        active = [sequence for sequence in sequences if len(sequence.output) < NUM_NEW]
        if not active:
            break
        kernels.add(driver.step(active, 48).kernels)
        if number == 6:
            driver.free(active[-1])
        for sequence in active:
            if len(sequence.output) == NUM_NEW:
                driver.free(sequence)
    answers = [
        (sequence.output, [list(entry.logprobs) for entry in sequence.logprobs if entry])
        for sequence in sequences
    ]
    return answers, kernels


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize(("device", "attention", "is_eager", "kv_dtype"), SETUPS)
def test_spoiled_pages_change_nothing(
    root: Path, device: str, attention: str, is_eager: bool, kv_dtype: str, value: float
) -> None:
    backend = next(b for b in registry.list_backends("attention") if b.name == attention)
    if reason := backend.probe():
        pytest.skip(f"{attention}: {reason}")
    worker = make_worker(root, device, attention, is_eager, kv_dtype)
    try:
        spoil(worker, 0.0)
        clean, kernels = answer(root, worker)
    finally:
        worker.close()
    worker = make_worker(root, device, attention, is_eager, kv_dtype)
    try:
        spoil(worker, value)
        spoiled, _ = answer(root, worker)
    finally:
        worker.close()
    assert spoiled == clean
    numbers = [x for _, logprobs in clean for entry in logprobs for x in entry]
    assert len(numbers) == len(LENGTHS) * NUM_NEW * 3
    assert all(map(math.isfinite, numbers))
    assert any(name.startswith("graph") for name in kernels) == (not is_eager)
