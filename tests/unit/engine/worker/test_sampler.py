"""Sampling: every parameter against plain loops, and the draws against their distribution."""

import math
from array import array
from typing import Any

import numpy as np
import pytest
import torch

from loraplex.backends.fused import torch_ops
from loraplex.backends.fused.contract import FusedSpec
from loraplex.backends.fused.torch_ops import TorchFused, gumbel_noise
from loraplex.engine.worker import sampler
from loraplex.engine.worker.sampler import SamplingBatch, sample, score
from loraplex.engine.worker.sampling_states import SamplingStates, noise_keys
from loraplex.scheduler.worker_protocol import NOT_FINITE, SamplingSpec, int_array

VOCAB = 50
FUSED = TorchFused(FusedSpec(torch.float32, torch.device("cpu"), 64))

DEFAULTS: dict[str, Any] = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 0,
    "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    "max_tokens": 16, "min_tokens": 0, "stop_token_ids": int_array(), "num_logprobs": -1,
    "num_prompt_logprobs": -1, "bias_token_ids": int_array(), "bias_values": array("f"),
}  # fmt: skip


def make_spec(**values: Any) -> SamplingSpec:
    return SamplingSpec(**{**DEFAULTS, **values})


def draw(
    specs: list[SamplingSpec],
    logits: torch.Tensor,
    *,
    prompts: list[list[int]] | None = None,
    answers: list[list[int]] | None = None,
    slots: list[int] | None = None,
) -> list[int]:
    """One step of these requests, through the states and the sampler."""
    num = len(specs)
    prompts, answers = prompts or [[1]] * num, answers or [[]] * num
    slots = slots or list(range(num))
    states = SamplingStates(max(slots) + 1, logits.shape[1])
    token_ids = torch.full((max(slots) + 1, 64), 3, dtype=torch.int32)  # stale ids everywhere
    positions = []
    for slot, spec, prompt, answer in zip(slots, specs, prompts, answers, strict=True):
        states.set(slot, spec, len(prompt))
        token_ids[slot, : len(prompt + answer)] = torch.tensor(prompt + answer)
        positions.append(len(prompt + answer))
    arrays = states.collect(np.array(slots, dtype=np.int32), np.array(positions, dtype=np.int32))
    batch = SamplingBatch(**{name: torch.from_numpy(value) for name, value in arrays.items()})
    before = logits.clone()
    sampled = sample(logits, batch, token_ids, max(positions), fused=FUSED)
    torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)
    return sampled.tolist()


def naive_distribution(
    spec: SamplingSpec, logits: list[float], prompt: list[int], answer: list[int]
) -> list[float]:
    """Probabilities in float64, one token at a time, in the documented order."""
    values = list(logits)
    for token, bias in zip(spec.bias_token_ids, spec.bias_values, strict=True):
        values[token] += bias
    for token in range(len(values)):
        if token in prompt or token in answer:
            values[token] *= (
                1 / spec.repetition_penalty if values[token] > 0 else spec.repetition_penalty
            )
        values[token] -= spec.frequency_penalty * answer.count(token)
        values[token] -= spec.presence_penalty * (token in answer)
        ends = spec.stop_token_ids + spec.ignored_eos_ids
        if len(answer) < spec.min_tokens and token in ends:
            values[token] = -math.inf
    if spec.temperature == 0:
        best = values.index(max(values))
        return [float(token == best) for token in range(len(values))]
    probs = softmax([value / spec.temperature for value in values])
    probs = [p if p >= spec.min_p * max(probs) else 0.0 for p in probs]
    if spec.top_k:
        kth = sorted(probs, reverse=True)[min(spec.top_k, len(probs)) - 1]
        probs = [p if p >= kth else 0.0 for p in probs]
    probs = [p / sum(probs) for p in probs]
    kept, mass = [0.0] * len(probs), 0.0
    for token in sorted(range(len(probs)), key=lambda t: -probs[t]):
        if mass < spec.top_p:
            kept[token] = probs[token]
        mass += probs[token]
    return [p / sum(kept) for p in kept]


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    weights = [math.exp(value - top) for value in values]
    return [weight / sum(weights) for weight in weights]


SPECS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 3.0},
    "top-k": {"top_k": 5},
    "top-k-1": {"top_k": 1},
    "top-k-all": {"top_k": 1000},
    "top-p": {"top_p": 0.7},
    "top-p-small": {"top_p": 1e-6},
    "min-p": {"min_p": 0.2},
    "min-p-1": {"min_p": 1.0},
    "repetition": {"repetition_penalty": 1.8, "temperature": 0.7},
    "repetition-below-1": {"repetition_penalty": 0.5},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -1.2},
    "bias": {"bias_token_ids": int_array([4, 9]), "bias_values": array("f", [3.0, -50.0])},
    "min-tokens": {"min_tokens": 4, "stop_token_ids": int_array([6, 7, 8, 1000])},
    "min-tokens-ignoring-the-end": {"min_tokens": 4, "ignored_eos_ids": int_array([6, 7])},
    "min-tokens-reached": {"min_tokens": 3, "stop_token_ids": int_array([6, 7])},
    "everything": {
        "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3,
        "presence_penalty": 0.4, "frequency_penalty": 0.3, "min_tokens": 9,
        "stop_token_ids": int_array([2]), "bias_token_ids": int_array([2, 11]),
        "bias_values": array("f", [9.0, 1.0]),
    },
    "greedy-penalized": {
        "temperature": 0.0, "repetition_penalty": 4.0, "frequency_penalty": 1.0, "min_tokens": 9,
        "stop_token_ids": int_array([2]), "bias_token_ids": int_array([17]),
        "bias_values": array("f", [0.7]),
    },
}  # fmt: skip
PROMPT, ANSWER = [1, 5, 9, 9, 30], [5, 5, 12]


@pytest.mark.parametrize("name", SPECS)
def test_draws_follow_the_distribution(name: str) -> None:
    """Chi-square over many seeds, all other requests of SPECS being in the same batches."""
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 1.5
    spec = make_spec(**SPECS[name])
    want = naive_distribution(spec, logits.tolist(), PROMPT, ANSWER)
    num_seeds, others = 4000, [make_spec(**values) for values in SPECS.values()]
    counts = np.zeros(VOCAB)
    for start in range(0, num_seeds, 500):
        specs = [make_spec(**SPECS[name], seed=seed) for seed in range(start, start + 500)] + others
        ids = draw(
            specs,
            logits.expand(len(specs), -1),
            prompts=[PROMPT] * len(specs),
            answers=[ANSWER] * len(specs),
        )
        counts += np.bincount(ids[:500], minlength=VOCAB)
    probs = np.array(want)
    assert counts[probs == 0].sum() == 0
    assert chi_square_tail(counts, probs * num_seeds) > 1e-4


def chi_square_tail(counts: np.ndarray, expected: np.ndarray) -> float:
    """P(a chi-square as large), by Wilson and Hilferty; rare values are pooled."""
    rare = expected < 8
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    degrees = len(expected) - 1
    if degrees == 0:
        return 1.0
    statistic = float(((observed - expected) ** 2 / expected).sum())
    spread = 2 / (9 * degrees)
    deviate = ((statistic / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return 0.5 * math.erfc(deviate / math.sqrt(2))


def test_seed_fixes_the_answer_whatever_the_batch() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(9, VOCAB, generator=generator)
    specs = [make_spec(seed=seed, temperature=2.0) for seed in (-5, 0, 1, 2**63 - 1, 7, 7, 8, 9, 3)]
    together = draw(specs, logits)
    for order in ([0], [3, 1], [8, 7, 6, 5, 4, 3, 2, 1, 0]):
        alone = draw(
            [specs[i] for i in order], logits[order], slots=[17 - 2 * i for i in range(len(order))]
        )
        assert alone == [together[i] for i in order]
    same = draw([specs[4]] * 3, logits[4].expand(3, -1))
    assert same == [together[4]] * 3


def test_seed_and_position_change_the_draw() -> None:
    flat = torch.zeros(200, 1000)
    by_seed = draw([make_spec(seed=seed) for seed in range(200)], flat)
    by_position = draw([make_spec(seed=3)] * 60, flat[:60], prompts=[[1] * n for n in range(1, 61)])
    assert len(set(by_seed)) > 160 and len(set(by_position)) > 52


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [make_spec(**values, seed=i) for i, values in enumerate(SPECS.values())]
    logits = torch.randn(len(specs), VOCAB, generator=torch.Generator().manual_seed(3))
    texts = {"prompts": [PROMPT] * len(specs), "answers": [ANSWER] * len(specs)}
    whole = draw(specs, logits, **texts)
    monkeypatch.setattr(sampler, "CHUNK_ELEMS", 3 * VOCAB)
    monkeypatch.setattr(torch_ops, "CHUNK_ELEMS", 2 * VOCAB)
    assert draw(specs, logits, **texts) == whole


@pytest.mark.parametrize("name", SPECS)
def test_broken_logits_give_no_token(name: str) -> None:
    """Nothing that adjusts logits hides a NaN or +inf, not even under a forbidden id."""
    good = torch.randn(VOCAB, generator=torch.Generator().manual_seed(8)).bfloat16()
    spec = make_spec(**SPECS[name])
    named = {*spec.stop_token_ids, *spec.ignored_eos_ids, *spec.bias_token_ids}
    places = {0, 5, VOCAB - 1} | {token_id for token_id in named if token_id < VOCAB}
    rows = [good.clone() for _ in range(2 * len(places) + 2)]
    for index, place in enumerate(sorted(places)):
        rows[index][place] = torch.nan
        rows[len(places) + index][place] = torch.inf
    rows[-2][:] = -torch.inf
    texts = {"prompts": [PROMPT] * len(rows), "answers": [ANSWER] * len(rows)}
    got = draw([spec] * len(rows), torch.stack(rows), **texts)
    assert got[:-1] == [NOT_FINITE] * (len(rows) - 1)
    assert got[-1] >= 0


def test_masks_of_the_user_are_legal() -> None:
    """A bias of -inf removes a token; a request that removes every token has none to draw."""
    logits = torch.zeros(3, VOCAB)
    logits[:, 7] = 9.0

    def mask(ids: list[int], **values: Any) -> SamplingSpec:
        bias = array("f", [-math.inf] * len(ids))
        return make_spec(bias_token_ids=int_array(ids), bias_values=bias, **values)

    specs = [mask([7], temperature=0.0), mask([*range(49)]), mask([*range(VOCAB)])]
    assert draw(specs, logits) == [0, 49, NOT_FINITE]


@pytest.mark.parametrize(
    "bad", [{3: math.nan}, {3: math.inf}, dict.fromkeys(range(VOCAB), -math.inf)]
)
def test_scores_of_broken_logits_are_nan(bad: dict[int, float]) -> None:
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(4))
    for token_id, value in bad.items():
        logits[1, token_id] = value
    logits[0, 9] = -torch.inf
    scores = score(logits, torch.tensor([5, 5], dtype=torch.int32), 3)
    assert scores.logprobs[0].isfinite().all()
    assert scores.logprobs[1].isnan().all()


class OnlyDraws:
    """FusedOps that remembers what it drew from."""

    name = "only-draws"

    def draw(
        self, logits: torch.Tensor, temperature: torch.Tensor, keys: torch.Tensor, **masks: Any
    ) -> torch.Tensor:
        self.logits, self.temperature, self.masks = logits, temperature, masks
        return FUSED.draw(logits, temperature, keys, **masks)


def test_plain_batch_draws_from_the_logits_themselves() -> None:
    states, fused = SamplingStates(4, VOCAB), OnlyDraws()
    states.set(2, make_spec(temperature=0.0, top_k=3, top_p=0.5, min_p=0.1), 1)
    states.set(0, make_spec(temperature=1.5), 1)
    mask = np.full(-(-VOCAB // 32), -2, dtype=np.int32)  # all but every 32nd token
    arrays = states.collect(
        np.array([2, 0], dtype=np.int32), np.array([5, 3], dtype=np.int32), {1: mask}
    )
    batch = SamplingBatch(**{name: torch.from_numpy(value) for name, value in arrays.items()})
    logits = torch.randn(2, VOCAB).bfloat16()
    logits[:, 32] = 30.0
    sampled = sample(logits, batch, torch.zeros(4, 9, dtype=torch.int32), 5, fused=fused)
    assert fused.logits is logits
    assert sampled[0] == 32 and sampled[1] % 32
    assert fused.masks["mask_places"].tolist() == [-1, 0]
    assert fused.temperature.tolist() == [0.0, 1.5]


def test_neighbours_with_other_parameters_change_nothing() -> None:
    """A plain row is drawn the same beside rows that take the long way."""
    logits = torch.randn(40, VOCAB, generator=torch.Generator().manual_seed(6)).bfloat16()
    plain = [make_spec(seed=seed, temperature=seed % 3 / 2) for seed in range(40)]
    alone = draw(plain, logits)
    spicy = [make_spec(**values) for values in SPECS.values()]
    texts = [[1]] * 40 + [PROMPT] * len(spicy)
    mixed = draw(plain + spicy, torch.cat((logits, logits[: len(spicy)])), prompts=texts)
    assert mixed[:40] == alone


def test_cleared_slot_leaves_nothing_behind() -> None:
    states = SamplingStates(1, VOCAB)
    slot, position = np.array([0], dtype=np.int32), np.array([3], dtype=np.int32)
    states.set(0, make_spec(**SPECS["everything"]), 1)
    states.clear(0)
    states.set(0, make_spec(temperature=0.0), 1)
    arrays = states.collect(slot, position)
    assert set(arrays) == {"temperature", "keys"} and arrays["temperature"] == [0]
    assert states.num_logprobs[0] == -1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_noise_is_gumbel_and_independent(device: str) -> None:
    seeds = np.arange(64, dtype=np.uint64)
    keys = torch.from_numpy(noise_keys(seeds, np.full(64, 7, dtype=np.int32))).to(device)
    noise = gumbel_noise(keys, 20_000)
    assert torch.isfinite(noise).all()
    assert abs(float(noise.mean()) - 0.57722) < 0.01
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.02
    correlation = torch.corrcoef(noise)[~torch.eye(64, dtype=torch.bool, device=device)]
    assert float(correlation.abs().max()) < 0.05
    shifted = torch.corrcoef(torch.stack([noise[:, :-1].reshape(-1), noise[:, 1:].reshape(-1)]))
    assert abs(float(shifted[0, 1])) < 0.01
    assert torch.equal(noise, gumbel_noise(keys, 20_000))
    torch.testing.assert_close(noise.cpu(), gumbel_noise(keys.cpu(), 20_000), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_best", [0, 1, 5, VOCAB, VOCAB + 9])
def test_score(num_best: int) -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(4)) * 3
    tokens = torch.tensor([0, 7, 49, int(logits[3].argmax())])
    scores = score(logits, tokens, num_best)
    for row, token in enumerate(tokens.tolist()):
        want = [math.log(p) for p in softmax(logits[row].tolist())]
        order = sorted(range(VOCAB), key=lambda t: -want[t])
        assert int(scores.ranks[row]) == order.index(token) + 1
        assert scores.token_ids[row].tolist() == [token, *order[:num_best]]
        for got, token_id in zip(scores.logprobs[row], scores.token_ids[row].tolist(), strict=True):
            assert float(got) == pytest.approx(want[token_id], abs=1e-4)
