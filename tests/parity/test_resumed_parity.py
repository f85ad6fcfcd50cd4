"""An answer that is cut after k tokens and sent again ends equal to the uncut one, on a model."""

from array import array
from typing import Any

import pytest
from msgspec.structs import replace

from loraplex.engine.config import EngineConfig, ModelConfig
from loraplex.engine.worker.worker import Worker
from loraplex.memory.config import MemoryConfig
from loraplex.scheduler.config import SchedulerConfig
from loraplex.scheduler.frontend_protocol import AddRequest, SequenceOutput
from loraplex.scheduler.worker_protocol import SamplingSpec, int_array

from helpers.models.hf_models import make_hf_model
from helpers.running.bare_engine import BareEngine, token_ids
from helpers.running.step_driver import GREEDY

MAX_TOKENS = 24
PROMPT = array("i", [5, 9, 200, 31, 5, 9, 77])
LIKELY = {"bias_token_ids": int_array([7, 8]), "bias_values": array("f", [5.0, 4.0])}
DRAWN = {"temperature": 0.9, "top_p": 0.95, "seed": 1234567}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "repetition": {"repetition_penalty": 1.3},
    "seeded": DRAWN,
    "seeded, second of n": DRAWN | {"seed": 7654321},
    "penalties": DRAWN | LIKELY | {"presence_penalty": 1.5, "frequency_penalty": 1.5},
    "logprobs": {"num_logprobs": 3, "num_prompt_logprobs": 2},
    "min_tokens": {"min_tokens": 15, "stop_token_ids": int_array(list(range(0, 512, 2)))},
    "bias": LIKELY,
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> BareEngine:
    base = tmp_path_factory.mktemp("resumed") / "base"
    make_hf_model("llama", base, seed=3, num_hidden_layers=2)
    config = EngineConfig(
        model=ModelConfig(model=str(base), device="cpu", dtype="float32", skip_tokenizer_init=True),
        memory=MemoryConfig(num_pages=256, block_tokens=4),
        scheduler=SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=64),
    )
    return BareEngine(config, Worker)


def request(request_id: int, case: str, **fields: Any) -> AddRequest:
    spec = SamplingSpec(**GREEDY | {"max_tokens": MAX_TOKENS} | CASES[case])
    return AddRequest(request_id, PROMPT, spec, **fields)


def logprobs(outputs: list[SequenceOutput]) -> list[tuple[list[int], list[float]]]:
    entries = [entry for output in outputs for entry in output.logprobs]
    return [(list(entry.token_ids), list(entry.logprobs)) for entry in entries]


def test_a_cut_answer_ends_as_the_uncut_one(engine: BareEngine) -> None:
    whole = engine.serve([request(i, case) for i, case in enumerate(CASES)])
    for cut in (1, 2, 11, MAX_TOKENS - 1):
        known = {i: token_ids(outputs)[:cut] for i, outputs in whole.items()}
        resumed = [
            request(i, case, generated_token_ids=known[i], use_prefix_cache=(i + cut) % 2 == 0)
            for i, case in enumerate(CASES)
            if cut < len(token_ids(whole[i]))
        ]
        rest = engine.serve(resumed)
        for i, outputs in rest.items():
            case = list(CASES)[i]
            assert known[i] + token_ids(outputs) == token_ids(whole[i]), (case, cut)
            assert outputs[-1].finish_reason == whole[i][-1].finish_reason
            assert outputs[-1].stop_token_id == whole[i][-1].stop_token_id
            assert not any(output.prompt_logprobs for output in outputs)
            expected = logprobs(whole[i])[cut:]
            assert [ids for ids, _ in logprobs(outputs)] == [ids for ids, _ in expected]
            for (_, got), (_, want) in zip(logprobs(outputs), expected, strict=True):
                assert got == pytest.approx(want, abs=1e-4)


def test_tokens_taken_for_a_prompt_would_change_the_answer(engine: BareEngine) -> None:
    """The engine needs to know which tokens are prompt: penalties and min_tokens depend on it."""
    for case in ("penalties", "min_tokens"):
        asked = request(0, case)
        whole = token_ids(engine.serve([asked])[0])
        cut = 6
        left = replace(asked.sampling, max_tokens=MAX_TOKENS - cut)
        naive = AddRequest(1, PROMPT + whole[:cut], left)
        assert token_ids(engine.serve([naive])[1]) != whole[cut:], case
