"""The bf16 checks of tests/gpu/test_tensor_parallel_gpu.py, of two ranks on a CPU."""

import pytest

from helpers.models.bf16_oracles import Oracles
from helpers.models.rank_runs import RankRuns

pytestmark = pytest.mark.long

SIZES = {"hidden_size": 128, "num_attention_heads": 8, "head_dim": 16, "intermediate_size": 161,
         "vocab_size": 509}  # fmt: skip


@pytest.fixture(scope="module")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> Oracles:
    return Oracles("llama3", tmp_path_factory.mktemp("llama3"), device="cpu", sizes=SIZES)


@pytest.fixture(scope="module")
def two(oracles: Oracles) -> RankRuns:
    return RankRuns(oracles, in_process=False, tensor_parallel_size=2, pool_bytes=1 << 26)


def test_two_ranks_are_right_within_the_noise_of_bf16(two: RankRuns) -> None:
    two.judge("two ranks, plain", two.plain())
    run = two.fast()
    two.judge("two ranks, fast", run)
    assert run.stats["num_preemptions"] > 0


def test_overlap_changes_nothing_on_two_ranks(two: RankRuns) -> None:
    noise = two.judge("two ranks, plain", two.plain())
    two.compare("two ranks, fast and plain", two.fast().outputs, two.plain().outputs, noise)


def test_a_warm_prefix_cache_on_two_ranks(two: RankRuns) -> None:
    plain = two.plain()
    assert all(
        output.num_cached_tokens >= len(case.prompt) // 16 * 16 - 16
        for output, case in zip(plain.warm, two.cases, strict=True)
    )
    noise = two.judge("two ranks, plain", plain)
    two.compare("two ranks, warm and cold", plain.warm, plain.outputs, noise)


def test_two_ranks_are_as_near_as_one(two: RankRuns, oracles: Oracles) -> None:
    one = RankRuns(oracles, pool_bytes=1 << 26)
    run = one.other("one rank")
    noise = one.judge("one rank", run)
    one.compare("two ranks and one", two.fast().outputs, run.outputs, noise)
