"""Sampling parameters of the running requests, as arrays by slot."""

from typing import Any

import numpy as np
import numpy.typing as npt

from loraplex.engine.worker.bad_words import BadWords
from loraplex.scheduler.worker_protocol import SamplingSpec

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_LOW_32 = np.uint64(0xFFFFFFFF)


class SamplingStates:
    """Holds the parameters on the CPU. `collect` returns those of one step; see sampler.py."""

    def __init__(self, max_num_seqs: int, vocab_size: int) -> None:
        """`vocab_size` is the base model's."""
        self._base_vocab_size = vocab_size
        self._vocab_size = np.full(max_num_seqs, vocab_size, dtype=np.int64)
        self.num_prompt_tokens = np.zeros(max_num_seqs, dtype=np.int32)
        self.num_logprobs = np.full(max_num_seqs, -1, dtype=np.int32)
        self.num_prompt_logprobs = np.full(max_num_seqs, -1, dtype=np.int32)
        self._temperature = np.zeros(max_num_seqs, dtype=np.float32)
        self._top_p = np.ones(max_num_seqs, dtype=np.float32)
        self._top_k = np.zeros(max_num_seqs, dtype=np.int64)
        self._min_p = np.zeros(max_num_seqs, dtype=np.float32)
        self._seed = np.zeros(max_num_seqs, dtype=np.uint64)
        # repetition, presence, frequency
        self._penalties = np.tile(np.array([1, 0, 0], dtype=np.float32), (max_num_seqs, 1))
        self._min_tokens = np.zeros(max_num_seqs, dtype=np.int32)
        self._stop_ids: list[npt.NDArray[np.int64] | None] = [None] * max_num_seqs
        self._bias_ids: list[npt.NDArray[np.int64] | None] = [None] * max_num_seqs
        self._bias: list[npt.NDArray[np.float32] | None] = [None] * max_num_seqs
        self._allowed: list[Any] = [None] * max_num_seqs  # masks, as pack_mask makes them
        self._has_allowed = np.zeros(max_num_seqs, dtype=np.bool_)
        self._bad_words: list[BadWords | None] = [None] * max_num_seqs
        self._has_bad_words = np.zeros(max_num_seqs, dtype=np.bool_)

    def set(
        self, slot: int, spec: SamplingSpec, num_prompt_tokens: int, vocab_size: int | None = None
    ) -> None:
        """Keep the parameters of a request. `vocab_size` is its adapter's, if it has its own."""
        vocab_size = vocab_size or self._base_vocab_size
        self._vocab_size[slot] = vocab_size
        self.num_prompt_tokens[slot] = num_prompt_tokens
        self.num_logprobs[slot] = spec.num_logprobs
        self.num_prompt_logprobs[slot] = spec.num_prompt_logprobs
        self._temperature[slot] = spec.temperature
        self._top_p[slot] = spec.top_p
        self._top_k[slot] = spec.top_k if 0 < spec.top_k < vocab_size else 0
        self._min_p[slot] = spec.min_p
        self._seed[slot] = spec.seed & 0xFFFFFFFFFFFFFFFF
        self._penalties[slot] = (
            spec.repetition_penalty,
            spec.presence_penalty,
            spec.frequency_penalty,
        )
        self._min_tokens[slot] = spec.min_tokens
        # An id outside the vocabulary can neither be sampled nor biased.
        stop_ids = np.array(spec.stop_token_ids + spec.ignored_eos_ids, dtype=np.int64)
        self._stop_ids[slot] = stop_ids[(stop_ids >= 0) & (stop_ids < vocab_size)]
        bias_ids = np.array(spec.bias_token_ids, dtype=np.int64)
        known = (bias_ids >= 0) & (bias_ids < vocab_size)
        self._bias_ids[slot] = bias_ids[known] if known.any() else None
        self._bias[slot] = np.array(spec.bias_values, dtype=np.float32)[known]
        allowed = np.array(spec.allowed_token_ids, dtype=np.int64)
        self._allowed[slot] = pack_mask(allowed, vocab_size) if len(allowed) else None
        self._has_allowed[slot] = len(allowed) > 0
        self._bad_words[slot] = BadWords.of(spec)
        self._has_bad_words[slot] = self._bad_words[slot] is not None

    def clear(self, slot: int) -> None:
        self.num_logprobs[slot] = self.num_prompt_logprobs[slot] = -1
        self._stop_ids[slot] = self._bias_ids[slot] = self._bias[slot] = None
        self._allowed[slot] = self._bad_words[slot] = None
        self._has_bad_words[slot] = self._has_allowed[slot] = False

    def collect(
        self,
        slots: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        masks: dict[int, npt.NDArray[np.int32]] | None = None,
    ) -> dict[str, npt.NDArray[Any]]:
        """Returns the arrays of N rows that sample, by the names of SamplingBatch's fields.

        A field that may be None is left out if no row uses its parameter.

        Args:
            slots: int32 [N].
            positions: int32 [N], of the tokens to be sampled.
            masks: by row, of those whose next token a grammar restricts.
        """
        arrays: dict[str, npt.NDArray[Any]] = {
            "temperature": self._temperature[slots],
            "keys": noise_keys(self._seed[slots], positions),
        }
        self._collect_bias(slots, arrays)
        self._collect_penalties(slots, positions, arrays)
        self._collect_forbidden(slots, positions, arrays)
        self._collect_bad_words(slots, positions, arrays)
        self._collect_masks(slots, masks or {}, arrays)
        self._collect_cuts(slots, arrays)
        return arrays

    def _collect_masks(
        self,
        slots: npt.NDArray[np.int32],
        masks: dict[int, npt.NDArray[np.int32]],
        arrays: dict[str, npt.NDArray[Any]],
    ) -> None:
        found = dict(masks)
        for row in np.flatnonzero(self._has_allowed[slots]).tolist():
            allowed = self._allowed[slots[row]]
            if row in found:
                allowed, other = _stack([allowed, found[row]])
                allowed = allowed & other
            found[row] = allowed
        if found:
            arrays["mask_places"] = np.full(len(slots), -1, dtype=np.int32)
            arrays["mask_places"][list(found)] = np.arange(len(found), dtype=np.int32)
            arrays["masks"] = _stack(list(found.values()))

    def _collect_cuts(
        self, slots: npt.NDArray[np.int32], arrays: dict[str, npt.NDArray[Any]]
    ) -> None:
        min_p, top_k, top_p = self._min_p[slots], self._top_k[slots], self._top_p[slots]
        is_cut = (min_p > 0) | (top_k > 0) | (top_p < 1)
        rows = np.flatnonzero(is_cut & (self._temperature[slots] > 0))
        if not len(rows):
            return
        arrays["cut_rows"] = rows.astype(np.int64)
        if (min_p[rows] > 0).any():
            arrays["min_p"] = min_p[rows]
        if (top_k[rows] > 0).any():
            arrays["top_k"] = np.where(top_k > 0, top_k, self._vocab_size[slots])[rows]
        if (top_p[rows] < 1).any():
            arrays["top_p"] = top_p[rows]

    def _collect_bias(
        self, slots: npt.NDArray[np.int32], arrays: dict[str, npt.NDArray[Any]]
    ) -> None:
        rows, ids, values = [], [], []
        for row, slot in enumerate(slots.tolist()):
            bias_ids = self._bias_ids[slot]
            if bias_ids is not None:
                rows.append(np.full(len(bias_ids), row, dtype=np.int64))
                ids.append(bias_ids)
                values.append(self._bias[slot])
        if rows:
            arrays["bias_rows"], arrays["bias_ids"] = np.concatenate(rows), np.concatenate(ids)
            arrays["bias"] = np.concatenate(values)  # type: ignore[arg-type]

    def _collect_penalties(
        self,
        slots: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        arrays: dict[str, npt.NDArray[Any]],
    ) -> None:
        penalties = self._penalties[slots]
        rows = np.flatnonzero((penalties != (1, 0, 0)).any(axis=1))
        if len(rows):
            arrays["penalty_rows"] = rows.astype(np.int64)
            arrays["penalty_slots"] = slots[rows].astype(np.int64)
            arrays["penalties"] = penalties[rows]
            arrays["num_prompt_tokens"] = self.num_prompt_tokens[slots[rows]].astype(np.int64)
            arrays["num_known_tokens"] = positions[rows].astype(np.int64)

    def _collect_forbidden(
        self,
        slots: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        arrays: dict[str, npt.NDArray[Any]],
    ) -> None:
        num_generated = positions - self.num_prompt_tokens[slots]
        rows, ids = [], []
        for row in np.flatnonzero(num_generated < self._min_tokens[slots]).tolist():
            stop_ids = self._stop_ids[slots[row]]
            if stop_ids is not None and len(stop_ids):
                rows.append(np.full(len(stop_ids), row, dtype=np.int64))
                ids.append(stop_ids)
        for row in np.flatnonzero(self._has_bad_words[slots]).tolist():
            words = self._bad_words[slots[row]]
            if words is not None and len(words.single_ids):
                rows.append(np.full(len(words.single_ids), row, dtype=np.int64))
                ids.append(words.single_ids)
        if rows:
            arrays["forbidden_rows"] = np.concatenate(rows)
            arrays["forbidden_ids"] = np.concatenate(ids)

    def _collect_bad_words(
        self,
        slots: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        arrays: dict[str, npt.NDArray[Any]],
    ) -> None:
        rows, last_ids, prefixes = [], [], []
        num_words = 0
        for row in np.flatnonzero(self._has_bad_words[slots]).tolist():
            slot, position = int(slots[row]), int(positions[row])
            words = self._bad_words[slot]
            if words is None or not len(words.last_ids):
                continue
            rows.append(np.full(len(words.last_ids), row, dtype=np.int64))
            last_ids.append(words.last_ids)
            num_generated = position - int(self.num_prompt_tokens[slot])
            prefixes.append(words.prefixes(slot, position, num_generated, num_words))
            num_words += len(words.last_ids)
        if rows:
            arrays["word_rows"], arrays["word_ids"] = np.concatenate(rows), np.concatenate(last_ids)
            arrays["word_prefixes"] = np.concatenate(prefixes, axis=1)


def _stack(masks: list[npt.NDArray[np.int32]]) -> npt.NDArray[np.int32]:
    """Returns the masks as rows; the shorter ones, of smaller vocabularies, are filled with 0."""
    stacked = np.zeros((len(masks), max(map(len, masks))), dtype=np.int32)
    for row, mask in zip(stacked, masks, strict=True):
        row[: len(mask)] = mask
    return stacked


def pack_mask(token_ids: npt.NDArray[np.int64], vocab_size: int) -> npt.NDArray[np.int32]:
    """Returns the mask that allows these tokens, as StepPlan.masks has it."""
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    bits[token_ids[(token_ids >= 0) & (token_ids < vocab_size)]] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def noise_keys(
    seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.int32]
) -> npt.NDArray[np.int64]:
    """Returns the two 32-bit keys of the noise at each row's position, int64 [N, 2]."""
    mixed = _mix64(seeds ^ _mix64(positions.astype(np.uint64)))
    return np.stack([mixed & _LOW_32, mixed >> np.uint64(32)], axis=1).astype(np.int64)


def _mix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
