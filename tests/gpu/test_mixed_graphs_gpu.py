"""Steps in pieces of CUDA graphs against the same steps run eagerly, on a GPU.

The same forward in float32 on the CPU judges both: pieces may be no further from it than eager
steps are, but for the rounding of products of padded rows.
"""

from pathlib import Path

import pytest
import torch

from loraplex.backends import registry
from loraplex.backends.config import BackendConfig
from loraplex.engine.config import EngineConfig, GraphConfig, ModelConfig
from loraplex.engine.worker.graphs.capture import BASE
from loraplex.memory.config import MemoryConfig
from loraplex.scheduler.config import SchedulerConfig

from helpers.models.hf_models import make_hf_model
from helpers.models.peft_adapters import make_adapter
from helpers.running.step_runner import STEPS, StepRunner, make_sequences

pytestmark = pytest.mark.gpu

SIZES = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
         "intermediate_size": 1024, "num_hidden_layers": 4}  # fmt: skip
MAX_TOKENS = 160


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    model = make_hf_model("llama", root / "base", seed=4, **SIZES)
    make_adapter(model, root / "a", r=8, alpha=16, targets=["q_proj", "o_proj", "down_proj"],
                 strength=0.5)  # fmt: skip
    make_adapter(model, root / "b", r=17, alpha=8, targets="all-linear", seed=1, strength=0.5)
    return root


def make_runner(root: Path, device: str, dtype: str, lora: str, eager: bool) -> StepRunner:
    attention = "flashinfer" if device == "cuda" else "torch"
    config = EngineConfig(
        model=ModelConfig(model=str(root / "base"), device=device, dtype=dtype),
        memory=MemoryConfig(block_tokens=16, num_pages=400, max_lora_rank=32, max_adapter_slots=4),
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=MAX_TOKENS),
        backend=BackendConfig(lora_backend=lora, attention_backend=attention),
        graph=GraphConfig(enforce_eager=eager),
    )
    return StepRunner(config, root)


def run_steps(runner: StepRunner, poison: bool) -> None:
    sequences = make_sequences(runner.slots)
    for names, chunk in STEPS:
        if poison:
            runner.poison()
        runner.step([sequences[name] for name in names], min(chunk, 110))
    assert all(set(sequence.output) <= {4} for sequence in sequences.values())
    runner.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("lora", ["hybrid", "triton"])
def test_pieces_are_as_good_as_eager_steps(root: Path, lora: str, dtype: str) -> None:
    for op, name in (("attention", "flashinfer"), ("lora", lora)):
        reason = next(b for b in registry.list_backends(op) if b.name == name).probe()
        if reason:
            pytest.skip(f"{name}: {reason}")
    judge = make_runner(root, "cpu", "float32", "torch", eager=True)
    eager, pieces, again = (
        make_runner(root, "cuda", dtype, lora, eager=is_eager) for is_eager in (True, False, False)
    )
    run_steps(judge, poison=False)
    run_steps(eager, poison=False)
    run_steps(pieces, poison=True)
    run_steps(again, poison=False)  # what was left in the buffers changes no bit
    assert all(kernels.startswith("eager") for kernels in eager.kernels)
    kinds = {kind for _, kind, _ in pieces.used}
    assert "pieces" in pieces.kernels and BASE in kinds
    assert any(kernels.startswith("pieces+") for kernels in pieces.kernels)
    assert len(kinds) > 2 or lora != "hybrid"
    num_compared = 0
    for exact, want, got, repeated in zip(
        judge.hidden, eager.hidden, pieces.hidden, again.hidden, strict=True
    ):
        if got is None:  # one graph
            continue
        assert got.isfinite().all() and torch.equal(got, repeated)
        errors = [_rms(hidden.float().cpu() - exact) for hidden in (got, want)]
        print(f"\n{len(got)} tokens: error {errors[0]:.5f} in pieces, {errors[1]:.5f} eagerly")
        assert errors[0] < 1.25 * errors[1] + 1e-4
        assert _rms(got.float() - want.float()) < 0.05 * _rms(exact)
        num_compared += 1
    assert num_compared > 8
    null_page = pieces.pool[:, 0].unflatten(1, (2, 16, -1))
    assert null_page.isfinite().all() and not null_page[:, :, 1:].any()


def _rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())
