"""Masks of plans and allowed_token_ids, against plain loops."""

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from loraplex.backends.fused.masks import apply_masks
from loraplex.engine.worker.sampling_states import SamplingStates, pack_mask
from loraplex.engine.worker.step_rows import make_rows, masks_by_row
from loraplex.scheduler.worker_protocol import StepPlan, int_array

from helpers.fakes.fake_model import sampling_spec


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 50, 384])
def test_only_the_allowed_tokens_keep_their_logits(vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    logits = torch.randn(5, vocab_size)
    allowed = rng.random((3, vocab_size)) < 0.5
    masks = np.stack([pack_mask(np.flatnonzero(row), vocab_size) for row in allowed])
    places = torch.tensor([1, -1, 2, -1, 0], dtype=torch.int32)
    expected = logits.clone()
    for row, keep in zip([4, 0, 2], allowed, strict=True):
        for token_id in range(vocab_size):
            if not keep[token_id]:
                expected[row, token_id] = -torch.inf
    assert torch.equal(apply_masks(logits, places, torch.from_numpy(masks)), expected)


def test_a_broken_logit_stays_visible() -> None:
    logits = torch.tensor([[torch.nan, torch.inf, 1.0]])
    masks = torch.from_numpy(pack_mask(np.array([2]), 3)[None])
    masked = apply_masks(logits, torch.zeros(1, dtype=torch.int32), masks)
    assert masked.isnan().tolist() == [[True, True, False]]


def test_masks_reach_the_rows_that_sample_and_meet_allowed_ids() -> None:
    plan = StepPlan(
        step_id=0,
        freed_slots=int_array(),
        new_requests=[],
        page_slots=int_array(),
        page_ids=int_array(),
        slots=int_array([3, 1, 0]),
        positions=int_array([4, 0, 9]),
        num_tokens=int_array([1, 5, 1]),
        samples=int_array([1, 0, 1]),
        masked_rows=int_array([2]),
        masks=int_array([0b1110, 0]),
    )
    rows = make_rows(plan)
    states = SamplingStates(4, 40)
    for slot in range(4):
        states.set(slot, replace(sampling_spec(), allowed_token_ids=int_array([0, 3])), 2)
    states.set(3, sampling_spec(), 2)
    masks = masks_by_row(rows, plan.masked_rows, plan.masks)
    slots = rows.slots[rows.sampling]
    arrays = states.collect(slots, rows.next_positions, masks)
    assert arrays["mask_places"].tolist() == [-1, 0]
    assert arrays["masks"].tolist() == [[0b1000, 0]]
    arrays = states.collect(slots, rows.next_positions, {})
    assert arrays["masks"].tolist() == [[0b1001, 0]]
    states.clear(0)
    assert "masks" not in states.collect(slots, rows.next_positions, {})
