"""Computes the adapters' changes of the token embedding and the head for the rows of a step.

See memory/vocabulary_part.py for what a change is. Everything runs in float32 on one adapter after
the other, with shapes that depend on the step. So steps with such rows are not captured in graphs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from loraplex.backends.launch.upload import Uploader
from loraplex.backends.lora.contract import LoRABatch, LoRATable
from loraplex.engine.adapters.vocabulary.resident import ResidentPart, ResidentVocabulary
from loraplex.engine.worker.step_rows import StepRows
from loraplex.memory.vocabulary_part import stretch_elems

MIN_ADDED_COLUMNS = 64
"""Columns of logits for added tokens; more are a power of two, so that few widths occur."""

CHUNK_ELEMS = 1 << 22
"""Elements of U and of logits that are in float32 at one time, about."""


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """The rows of one adapter: int64 [m] on the device."""

    slot: int
    rows: torch.Tensor


class VocabularyRows:
    """A VocabularyChange."""

    def __init__(self, reader: "VocabularyReader", rows: list[AdapterRows]) -> None:
        self._reader = reader
        self._rows = rows

    def embed(self, token_ids: torch.Tensor, out: torch.Tensor) -> None:
        for adapter in self._rows:
            part = self._reader.resident.embedding(adapter.slot)
            if part is not None:
                self._embed_one(adapter, part, token_ids, out)

    def score(self, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        for adapter in self._rows:
            part = self._reader.resident.head(adapter.slot)
            if part is None or not len(adapter.rows):
                continue
            own_hidden = hidden.index_select(0, adapter.rows).float()
            if len(part.own):
                rows = self._reader.rows(adapter.slot, part).index_select(0, part.own)
                values = own_hidden.mm(rows.float().t()).to(logits.dtype)
                logits[adapter.rows[:, None], part.own_columns] = values
            if part.part.rank:
                self._add_low_rank(adapter, part, own_hidden, logits)

    def fit(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        resident, num_base = self._reader.resident, logits.shape[1]
        limits = [resident.num_tokens(a.slot) if len(a.rows) else num_base for a in self._rows]
        if (most := max(limits, default=num_base)) > num_base:
            num_added = max(MIN_ADDED_COLUMNS, 1 << (most - num_base - 1).bit_length())
            wide = logits.new_full((len(logits), num_base + num_added), -torch.inf)
            wide[:, :num_base] = logits
            logits = wide
        for adapter, limit in zip(self._rows, limits, strict=True):
            if limit < num_base:
                logits[:, limit:num_base].index_fill_(0, adapter.rows, -torch.inf)
            elif limit > num_base:
                self._score_added(adapter, hidden, logits)
        return logits

    def _score_added(
        self, adapter: AdapterRows, hidden: torch.Tensor, logits: torch.Tensor
    ) -> None:
        part = self._reader.resident.head(adapter.slot)
        assert part is not None  # the reader refuses adapters without rows for added tokens
        rows = self._reader.rows(adapter.slot, part).index_select(0, part.added)
        values = hidden.index_select(0, adapter.rows).float().mm(rows.float().t())
        logits[adapter.rows[:, None], part.added_ids] = values.to(logits.dtype)

    def _embed_one(
        self, adapter: AdapterRows, part: ResidentPart, token_ids: torch.Tensor, out: torch.Tensor
    ) -> None:
        tokens = self._reader.resident.sizes.tokens
        ids = token_ids.index_select(0, adapter.rows).long()
        is_own = (ids >= tokens.start) & (ids < tokens.stop)
        is_held = is_own | (ids >= tokens.total) if tokens.start == 0 else is_own
        values = out.index_select(0, adapter.rows).float()
        if len(part.token_ids):
            at = torch.searchsorted(part.token_ids, ids).clamp_max(len(part.token_ids) - 1)
            is_replaced = (part.token_ids[at] == ids) & is_held
            rows = self._reader.rows(adapter.slot, part).index_select(0, at)
            values = torch.where(is_replaced[:, None], rows.float(), values)
        if part.part.rank:
            by_token = self._reader.by_token(adapter.slot, part)
            own = (ids - tokens.start).clamp(0, len(by_token) - 1)
            narrow = by_token.index_select(0, own).float() * is_own[:, None]
            by_feature = self._reader.by_feature(adapter.slot, part).float()
            values += narrow.mm(by_feature) * part.part.scale
        out.index_copy_(0, adapter.rows, values.to(out.dtype))

    def _add_low_rank(
        self, adapter: AdapterRows, part: ResidentPart, hidden: torch.Tensor, logits: torch.Tensor
    ) -> None:
        by_feature = self._reader.by_feature(adapter.slot, part).float()
        narrow = hidden.mm(by_feature.t()) * part.part.scale
        by_token = self._reader.by_token(adapter.slot, part)
        step = max(1, CHUNK_ELEMS // (len(hidden) + part.part.rank))
        for start in range(0, len(by_token), step):
            columns = logits[:, start : start + step]
            added = narrow.mm(by_token[start : start + step].float().t())
            values = columns.index_select(0, adapter.rows).float() + added
            columns.index_copy_(0, adapter.rows, values.to(logits.dtype))


@dataclass(frozen=True, slots=True)
class VocabularyStep:
    """The changes of one step: for its tokens, and for the rows that sample."""

    tokens: VocabularyRows
    samples: VocabularyRows


class VocabularyReader:
    """Reads the matrices of resident adapters from their pages, and finds the rows of a step that
    need them."""

    def __init__(self, pages: torch.Tensor, table: LoRATable, resident: ResidentVocabulary) -> None:
        """`pages` are the pool's, [layers, pages, elements]."""
        self.resident = resident
        self._pages = pages
        self._table = table
        self._uploader = Uploader(pages.device)

    def plan(self, batch: LoRABatch, rows: StepRows) -> VocabularyStep | None:
        """Returns the changes of a step, or None if its adapters change layers alone."""
        if self.resident.is_empty:
            return None
        changed = np.flatnonzero(self.resident.changes(batch.segment_slots)).tolist()
        if not changed:
            return None
        last_tokens = rows.starts[rows.sampling + 1] - 1
        arrays: dict[str, np.ndarray] = {}
        for index in changed:
            start, stop = batch.segment_starts[index : index + 2]
            tokens = batch.token_order[start:stop].astype(np.int64)
            arrays[f"tokens {index}"] = tokens
            arrays[f"samples {index}"] = np.flatnonzero(np.isin(last_tokens, tokens))
        uploaded = self._uploader.upload(arrays)

        def rows_of(name: str) -> Iterator[AdapterRows]:
            for index in changed:
                yield AdapterRows(int(batch.segment_slots[index]), uploaded[f"{name} {index}"])

        return VocabularyStep(
            VocabularyRows(self, list(rows_of("tokens"))),
            VocabularyRows(self, list(rows_of("samples"))),
        )

    def all_rows(self, slot: int, num_rows: int) -> VocabularyRows | None:
        """Returns the changes where all rows are of the adapter in a slot of the table, or None if
        there are none."""
        num_base = self.resident.sizes.tokens.total
        if self.resident.head(slot) is None and self.resident.num_tokens(slot) == num_base:
            return None
        rows = torch.arange(num_rows, device=self._pages.device)
        return VocabularyRows(self, [AdapterRows(slot, rows)])

    def by_token(self, slot: int, part: ResidentPart) -> torch.Tensor:
        """Returns U of this rank's tokens, [tokens, rank]."""
        shape = (self.resident.sizes.tokens.size, part.part.rank)
        return self._read(slot, part.part.token_start, shape)

    def by_feature(self, slot: int, part: ResidentPart) -> torch.Tensor:
        """Returns V, [rank, hidden_size]."""
        shape = (part.part.rank, self.resident.sizes.hidden_size)
        return self._read(slot, part.part.feature_start, shape)

    def rows(self, slot: int, part: ResidentPart) -> torch.Tensor:
        """Returns the rows of all replaced tokens, [tokens, hidden_size]."""
        shape = (len(part.part.token_ids), self.resident.sizes.hidden_size)
        return self._read(slot, part.part.row_start, shape)

    def _read(self, slot: int, start: int, shape: tuple[int, int]) -> torch.Tensor:
        """Returns a copy of a matrix whose stretches begin at element `start` of each layer."""
        num_layers, _, page_elems = self._pages.shape
        num_elems = shape[0] * shape[1]
        stop = start + stretch_elems(num_elems, num_layers)
        first, last = start // page_elems, -(-stop // page_elems)
        pages = self._pages.index_select(1, self._table.page_table[slot, first:last])
        offset = first * page_elems
        stretches = pages.view(num_layers, -1)[:, start - offset : stop - offset]
        return stretches.reshape(-1)[:num_elems].view(shape)
