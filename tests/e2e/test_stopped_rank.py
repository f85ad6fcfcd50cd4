"""A rank of a real tiny model is stopped while the other one waits for it inside a layer."""

import os
import signal
import threading
from pathlib import Path

import psutil
import pytest

from loraplex import LLM, SamplingParams
from loraplex.engine.errors import EngineDeadError

from helpers.models.hf_models import make_hf_model
from helpers.running.processes import is_alive, run_dirs, wait_until, worker_pids

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_stopped_rank_is_named_and_nothing_is_left(victim: int, tmp_path: Path) -> None:
    make_hf_model("llama3", tmp_path / "base", seed=3)
    before = run_dirs()
    others = {child.pid for child in psutil.Process().children(recursive=True)}
    llm = LLM(
        str(tmp_path / "base"), device="cpu", skip_tokenizer_init=True, tensor_parallel_size=2
    )
    with llm:
        pids = {child.pid for child in psutil.Process().children(recursive=True)} - others
        ranks = worker_pids(besides=others)

        def stop() -> None:
            wait_until(lambda: llm.client.stats()["running"] > 0)
            os.kill(ranks[victim], signal.SIGSTOP)

        stopper = threading.Thread(target=stop)
        stopper.start()
        text = rf"worker {victim} was stopped .*, and was killed \(worker rank {victim} of 2\)"
        with pytest.raises(EngineDeadError, match=text):
            llm.generate(
                [{"prompt_token_ids": [1, 2, 3]}] * 4,
                SamplingParams(max_tokens=1500, ignore_eos=True, detokenize=False),
                use_tqdm=False,
            )
        stopper.join()
        wait_until(lambda: not any(map(is_alive, pids)))
        wait_until(lambda: run_dirs() <= before)
