"""Worker ranks that end, and rank counts that a model refuses."""

import os
import signal
import threading
from pathlib import Path

import pytest

from loraplex import LLM, SamplingParams
from loraplex.engine.config import EngineConfig, ModelConfig, ParallelConfig
from loraplex.engine.errors import ConfigError, EngineDeadError
from loraplex.engine.worker.worker import Worker

from helpers.models.hf_models import make_hf_model
from helpers.running.processes import is_alive, wait_until, worker_pids


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_rank_that_is_killed_ends_the_engine_with_its_name(victim: int, tmp_path: Path) -> None:
    make_hf_model("llama3", tmp_path / "base", seed=3)
    others = worker_pids()
    llm = LLM(
        str(tmp_path / "base"), device="cpu", skip_tokenizer_init=True, tensor_parallel_size=2
    )
    with llm:
        pids = worker_pids(besides=others)
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


@pytest.mark.parametrize(
    ("heads", "kv_heads", "world_size", "fitting"),
    [(4, 2, 3, "1, 2, 4"), (6, 3, 2, "1, 3, 6"), (9, 3, 4, "1, 3, 9"), (8, 8, 16, "1, 2, 4, 8")],
)
def test_heads_that_the_ranks_do_not_divide_are_refused(
    heads: int, kv_heads: int, world_size: int, fitting: str, tmp_path: Path
) -> None:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 16}
    make_hf_model("llama", tmp_path, hidden_size=16 * heads, **sizes)
    config = EngineConfig(
        model=ModelConfig(model=str(tmp_path), device="cpu"),
        parallel=ParallelConfig(tensor_parallel_size=world_size),
    )
    text = (
        f"tensor_parallel_size {world_size} does not fit a model of {heads} heads and {kv_heads} "
        f"KV heads; use one of {fitting}$"
    )
    with pytest.raises(ConfigError, match=text):
        Worker(config, 1)
