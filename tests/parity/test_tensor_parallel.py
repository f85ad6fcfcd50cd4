"""Several ranks on the CPU, over gloo and real processes, against Hugging Face + PEFT in fp32."""

import os
import signal
import threading
from pathlib import Path

import psutil
import pytest

from loraplex import LLM, SamplingParams
from loraplex.engine.errors import EngineDeadError

from helpers.models.engine_runs import check, run
from helpers.models.hf_models import make_hf_model
from helpers.models.peft_oracle import PeftOracle, make_adapters, make_cases
from helpers.running.processes import is_alive, wait_until

CASES = (
    pytest.param("llama3", 2, marks=pytest.mark.long),  # scaled RoPE
    ("qwen2", 2),  # biases
    pytest.param("qwen3", 2, marks=pytest.mark.long),  # norms of query and key heads
    ("llama", 4),  # fewer KV heads than ranks
)


@pytest.mark.parametrize(("architecture", "world_size"), CASES)
def test_ranks_answer_as_one_worker_would(
    architecture: str, world_size: int, tmp_path: Path
) -> None:
    model = make_hf_model(architecture, tmp_path / "base", seed=3)
    make_adapters(model, tmp_path / "adapters")
    oracle = PeftOracle(tmp_path / "base", tmp_path / "adapters", model=model)
    cases = make_cases(oracle, lengths=(1, 17, 64))
    outputs, stats = run(
        oracle,
        cases,
        repeat=2,  # the second time with a warm prefix cache
        in_process=False,
        tensor_parallel_size=world_size,
        max_num_batched_tokens=40,  # prompts run in chunks
        max_num_seqs=8,
    )
    check(oracle, cases, outputs)
    assert stats["prefix_hit_tokens"] > 0


def worker_pids() -> list[int]:
    """Returns the process ids of this process's workers, by rank."""
    children = psutil.Process().children(recursive=True)
    return [c.pid for c in children if any(a.endswith("worker_main") for a in c.cmdline())]


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_rank_that_is_killed_ends_the_engine_with_its_name(victim: int, tmp_path: Path) -> None:
    make_hf_model("llama3", tmp_path / "base", seed=3)
    llm = LLM(
        str(tmp_path / "base"), device="cpu", skip_tokenizer_init=True, tensor_parallel_size=2
    )
    with llm:
        pids = worker_pids()
        assert len(pids) == 2

        def kill() -> None:
            wait_until(lambda: llm.client.stats()["running"] > 0)
            os.kill(pids[victim], signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(EngineDeadError, match=f"worker {victim} was killed"):
            llm.generate(
                [{"prompt_token_ids": [1, 2, 3]}] * 4,
                SamplingParams(max_tokens=1500, ignore_eos=True, detokenize=False),
                use_tqdm=False,
            )
        killer.join()
        wait_until(lambda: not any(map(is_alive, pids)))
