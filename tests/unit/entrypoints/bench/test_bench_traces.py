"""The traces of `loraplex bench`, and the random adapters that they run over."""

import copy
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from loraplex.engine.errors import LoraplexError, QueueFullError
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.entrypoints.bench import dummy, traces
from loraplex.entrypoints.bench.measure import (
    LoadGenerator,
    Timeline,
    check_complete,
    percentiles,
    step_times,
    summarize,
    summarize_open_loop,
)
from loraplex.entrypoints.bench.names import MODELS, MODULES
from loraplex.entrypoints.client.outputs import CompletionOutput, RequestFailure, RequestOutput


def test_a_trace_is_the_same_each_time() -> None:
    first = traces.make_trace(200, 32, rate=2.0, alpha=0.5)
    assert first == traces.make_trace(200, 32, rate=2.0, alpha=0.5)
    assert first != traces.make_trace(200, 32, rate=2.0, alpha=0.5, seed=43)


def test_base_and_adapters_run_the_same_lengths() -> None:
    base, many = traces.make_trace(500, 0), traces.make_trace(500, 128)
    assert {r.adapter for r in base} == {None}
    assert [(r.num_prompt_tokens, r.num_new_tokens) for r in base] == [
        (r.num_prompt_tokens, r.num_new_tokens) for r in many
    ]
    assert {r.arrival_s for r in base} == {0.0}


def test_lengths_fill_their_range() -> None:
    trace = traces.make_trace(5000, 1)
    for lengths in ([r.num_prompt_tokens for r in trace], [r.num_new_tokens for r in trace]):
        assert (min(lengths), max(lengths)) == (8, 511)
        assert np.mean(lengths) == pytest.approx(259.5, rel=0.02)
    prompts, answers = zip(*((r.num_prompt_tokens, r.num_new_tokens) for r in trace), strict=True)
    assert abs(np.corrcoef(prompts, answers)[0, 1]) < 0.05


@pytest.mark.parametrize("cv", [0.5, 1.0, 4.0])
def test_gaps_have_their_mean_and_variation(cv: float) -> None:
    arrivals = [r.arrival_s for r in traces.make_trace(40000, 4, rate=5.0, cv=cv)]
    gaps = np.diff([0.0, *arrivals])
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(0.2, rel=0.06)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.06)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 3.0])
def test_power_law(alpha: float) -> None:
    trace = traces.make_trace(20000, 10, alpha=alpha)
    count = Counter(r.adapter for r in trace)
    assert set(count) <= set(range(10))
    for adapter in range(10):  # the distribution function of power(alpha) is x ** alpha
        expected = ((adapter + 1) / 10) ** alpha - (adapter / 10) ** alpha
        assert count[adapter] / len(trace) == pytest.approx(expected, abs=0.012)


def test_popularities_of_a_batch() -> None:
    assert traces.adapters_of_rows("distinct", 5, 5) == [0, 1, 2, 3, 4]
    assert traces.adapters_of_rows("identical", 3, 3) == [0, 0, 0]
    uniform = Counter(traces.adapters_of_rows("uniform", 64, 64))
    assert uniform == dict.fromkeys(range(8), 8)
    for num_rows in (1, 2, 7, 64, 1024):
        skewed = traces.adapters_of_rows("skewed", num_rows, num_rows)
        assert len(skewed) == num_rows and max(skewed) < num_rows
    count = Counter(skewed)
    for adapter in range(5):
        assert count[adapter] / count[adapter + 1] == pytest.approx(1.5, rel=0.05)
    with pytest.raises(ValueError, match="popularity must be one of"):
        traces.adapters_of_rows("odd", 4, 4)


def test_dealt_adapters_are_shuffled() -> None:
    dealt = [r.adapter for r in traces.make_trace(64, 4, popularity="distinct")]
    assert Counter(dealt) == dict.fromkeys(range(4), 16)
    assert dealt != sorted(dealt) and dealt != [row % 4 for row in range(64)]


def test_closed_batch() -> None:
    (base,) = set(traces.closed_batch(8, None, num_prompt_tokens=128, num_new_tokens=256))
    assert base == traces.TraceRequest(None, 128, 256)
    batch = traces.closed_batch(8, "distinct", num_prompt_tokens=1, num_new_tokens=1)
    assert [r.adapter for r in batch] == list(range(8))


def test_warm_up_reaches_every_adapter() -> None:
    trace = traces.make_trace(300, 40, rate=1.0)
    short = traces.warm_up_trace(trace, at_least=8)
    assert {r.adapter for r in short} == {r.adapter for r in trace}
    assert len(short) < 60
    assert len({r.num_new_tokens for r in short}) == 16 and {r.arrival_s for r in short} == {0.0}
    assert {r.num_prompt_tokens for r in short} <= {r.num_prompt_tokens for r in trace}


def test_warm_up_fills_steps_with_the_longest_prompts() -> None:
    trace = traces.make_trace(50, 3)
    for max_num_seqs, budget, expected in ((256, 8192, 2 * 17), (8, 8192, 16), (64, 100, 2)):
        full = traces.full_steps_trace(
            trace, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget
        )
        assert len(full) == expected
        longest = max(r.num_prompt_tokens for r in trace)
        assert {(r.num_prompt_tokens, r.num_new_tokens) for r in full} == {(longest, 1)}
    assert {r.adapter for r in full} <= {r.adapter for r in trace}


def test_prompts_differ_between_runs() -> None:
    trace = traces.make_trace(20, 0)
    first, second = (traces.make_prompts(trace, 1000, run=run) for run in (1, 2))
    assert first == traces.make_prompts(trace, 1000, run=1)
    assert [len(p) for p in first] == [r.num_prompt_tokens for r in trace]
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_times_of_a_run() -> None:
    one = Timeline(0.5, arrivals=[(1.0, 1), (1.2, 2), (1.6, 4), (1.7, 5)])
    two = Timeline(0.0, arrivals=[(1.2, 1), (1.6, 3), (1.9, 4)])
    row = summarize([one, two])
    assert row["new_tokens"] == 9 and row["seconds"] == 1.9
    assert row["ttft_ms_p50"] == row["ttft_ms_mean"] == pytest.approx(850.0)
    assert step_times([one, two])["step_ms"] == pytest.approx(200.0)  # from 1.2 s to 1.7 s
    assert sorted(two.gaps_s()) == pytest.approx([0.2, 0.2, 0.3])
    assert percentiles("x", []) == {}


class FakeClient:
    """Answers each poll with one more token for every open request; refuses adapter "bad"."""

    def __init__(self) -> None:
        self.open: dict[str, RequestOutput] = {}
        self.left: dict[str, int] = {}
        self.refused: list[str] = []
        self.most_open = 0

    def submit(
        self, prompt: list[int], params: SamplingParams, *, adapter: str | None, stream: bool
    ) -> str:
        request_id = f"r{len(self.left)}"
        assert stream and params.ignore_eos and params.max_tokens is not None
        self.left[request_id] = params.max_tokens
        self.open[request_id] = RequestOutput(request_id, outputs=[CompletionOutput(0)])
        self.most_open = max(self.most_open, len(self.open))
        if adapter == "bad":
            self.refused.append(request_id)
        return request_id

    def poll(self, timeout_s: float) -> list[RequestOutput | RequestFailure]:
        assert timeout_s >= 0
        found: list[RequestOutput | RequestFailure] = []
        for request_id, output in list(self.open.items()):
            output.outputs[0].token_ids.append(7)
            self.left[request_id] -= 1
            output.finished = self.left[request_id] == 0
            refused = request_id in self.refused
            failure = RequestFailure(request_id, QueueFullError("no room"))
            found.append(failure if refused else copy.deepcopy(output))
            if refused or output.finished:
                del self.open[request_id]
        return found


def test_the_load_generator_keeps_its_limit_and_the_order() -> None:
    client = FakeClient()
    generator = LoadGenerator(client, ["a0", "bad"], detokenize=False, max_open=3)
    trace = [traces.TraceRequest(0, 4, n, 0.003 * max(0, n - 10)) for n in range(1, 21)]
    timelines = generator.run(trace, [[1] * 4] * 20, title="")
    check_complete(timelines, trace)
    assert [t.num_tokens for t in timelines] == list(range(1, 21))
    assert all(t.ttft_s >= 0 for t in timelines), "sent before it was due"
    assert client.most_open == 3 and not client.open


def test_a_failed_request_misses_the_objective() -> None:
    late = Timeline(0.0, arrivals=[(2.0, 1)])
    failed = Timeline(0.0, error=QueueFullError("no room"))
    row = summarize_open_loop([Timeline(0.5, arrivals=[(1.0, 1)]), late, failed, failed], 1.0)
    assert (row["num_failed"], row["first_failure"], row["attainment"]) == (2, "no room", 0.25)
    assert row["new_tokens"] == 2


def test_an_incomplete_run_is_an_error() -> None:
    trace = [traces.TraceRequest(0, 4, 2), traces.TraceRequest(1, 4, 2)]
    generator = LoadGenerator(FakeClient(), ["a0", "bad"], detokenize=False, max_open=9)
    timelines = generator.run(trace, [[1] * 4] * 2, title="")
    with pytest.raises(QueueFullError, match="no room"):
        check_complete(timelines, trace)
    with pytest.raises(LoraplexError, match="request 0 got 2 tokens of 3"):
        check_complete(timelines[:1], [traces.TraceRequest(0, 4, 3)])


def test_configurations_are_those_of_the_models() -> None:
    assert dummy.model_config("llama-3-8b")["num_key_value_heads"] == 8
    assert dummy.model_config("llama-2-7b")["intermediate_size"] == 11008
    assert all(dummy.model_config(name)["vocab_size"] for name in MODELS)


def test_random_adapters(tmp_path: Path) -> None:
    config = dummy.model_config("tiny")
    writer = dummy.AdapterWriter(config, ranks=[8, 4], modules=MODULES)
    seen = set()
    for index in range(6):
        path = writer.write(tmp_path / str(index), index)
        rank = json.loads((path / "adapter_config.json").read_text())["r"]
        assert rank == (8, 4)[index % 2]
        with safe_open(path / "adapter_model.safetensors", "pt") as file:
            assert len(file.keys()) == 2 * 2 * len(MODULES)
            prefix = "base_model.model.model.layers.1"
            down_a = file.get_tensor(f"{prefix}.mlp.down_proj.lora_A.weight")
            keys_b = file.get_tensor(f"{prefix}.self_attn.k_proj.lora_B.weight")
        assert str(down_a.dtype) == "torch.bfloat16"
        assert down_a.shape == (rank, 128) and keys_b.shape == (32, rank)
        assert down_a.float().std().item() == pytest.approx(0.02, rel=0.1)
        seen.add(bytes(keys_b.float().numpy().tobytes()))
    assert len(seen) == 6
