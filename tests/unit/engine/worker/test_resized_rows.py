"""Embeddings and logits of adapters with more or fewer tokens than the base model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file

from loraplex.engine.adapters.peft_files import WEIGHTS_FILE, read_adapter
from loraplex.engine.adapters.table import AdapterTable, group_rows
from loraplex.engine.model.layers.embedding import Embedding
from loraplex.engine.model.shard import Piece
from loraplex.engine.worker.adapters.vocabulary_rows import VocabularyReader, VocabularyStep
from loraplex.engine.worker.sampling_states import SamplingStates
from loraplex.engine.worker.step_rows import StepRows
from loraplex.scheduler.worker_protocol import int_array

from helpers.fakes.fake_model import sampling_spec
from helpers.models.hf_models import make_hf_model
from helpers.models.vocabulary_adapters import EMBEDDING, HEAD, target_of
from helpers.vocabularies.resized_models import make_resized_adapter

SIZES = {0: 516, 1: 505}  # tokens of the adapter in each slot
ROWS = [0, -1, 1, 0]  # each row is a token of an adapter's slot, or of the base
TOKEN_IDS = [515, 511, 504, 7]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resized")
    make_hf_model("llama", root / "base")
    for slot, num_tokens in SIZES.items():
        folder = root / str(slot)
        make_resized_adapter(root / "base", folder, num_tokens, r=4, alpha=8, targets=["q_proj"])
    return root


def make_step(folders: Path, piece: Piece) -> VocabularyStep:
    target, num_pages = target_of(folders / "base", tokens=piece), 0
    table = AdapterTable(target, len(SIZES), torch.device("cpu"))
    pool = torch.zeros(3, 64, target.page_elems)
    for slot in SIZES:
        packed = read_adapter("mine", folders / str(slot), target)
        page_ids = torch.arange(num_pages + 1, num_pages + 1 + packed.num_pages).int()
        pool[:, page_ids] = packed.data.view(3, packed.num_pages, -1)
        num_pages += packed.num_pages
        table.write_device(slot, packed, page_ids)
        table.write_host(slot, packed, page_ids)
    assert table.vocabulary is not None
    ones, order = np.ones(len(ROWS), dtype=np.int32), np.arange(len(ROWS))
    starts = np.arange(len(ROWS) + 1)
    rows = StepRows(ones, ones, ones, starts, order, order, ones)
    batch = group_rows(np.array(ROWS, dtype=np.int32), ones)
    step = VocabularyReader(pool, table.table, table.vocabulary).plan(batch, rows)
    assert step is not None
    return step


def matrix(folders: Path, slot: int, prefix: str) -> torch.Tensor:
    return load_file(folders / str(max(slot, 0)) / WEIGHTS_FILE)[prefix + "weight"]


def test_embeddings_of_one_rank(folders: Path) -> None:
    piece, out = Piece(0, 512, 512, 512), torch.empty(len(ROWS), 64)
    embedding = Embedding(piece, 64, dtype=torch.float32, device=torch.device("cpu"))
    embedding.weight.copy_(matrix(folders, 0, EMBEDDING)[:512])
    embedding(torch.tensor(TOKEN_IDS), out, make_step(folders, piece).tokens)
    expected = [matrix(folders, s, EMBEDDING)[t] for s, t in zip(ROWS, TOKEN_IDS, strict=True)]
    assert torch.equal(out, torch.stack(expected))


def test_one_of_two_ranks_adds_the_rows_of_added_tokens(folders: Path) -> None:
    total = torch.zeros(len(ROWS), 64)
    base, ids = matrix(folders, 0, EMBEDDING), torch.tensor(TOKEN_IDS)
    for piece in (Piece(0, 300, 300, 512), Piece(300, 512, 300, 512)):
        own = (ids >= piece.start) & (ids < piece.stop)
        partial = base[ids] * own[:, None]
        make_step(folders, piece).tokens.embed(ids, partial)
        total += partial
    assert torch.equal(total, base[ids])


def test_each_row_has_the_logits_of_its_vocabulary(folders: Path) -> None:
    hidden = torch.randn(len(ROWS), 64, generator=torch.Generator().manual_seed(1))
    logits = hidden @ matrix(folders, 0, HEAD)[:512].t()
    fitted = make_step(folders, Piece(0, 512, 512, 512)).samples.fit(hidden, logits.clone())
    assert fitted.shape == (4, 512 + 64)
    for row, slot in enumerate(ROWS):
        size = SIZES.get(slot, 512)
        expected = hidden[row] @ matrix(folders, slot, HEAD)[:size].t()
        torch.testing.assert_close(fitted[row, :size], expected)
        assert bool((fitted[row, size:] == -torch.inf).all())


def test_sampling_parameters_count_the_adapters_tokens() -> None:
    states = SamplingStates(2, 512)
    spec = sampling_spec(min_tokens=1, stop_token_ids=(511, 515, 516))
    spec = replace(spec, temperature=1.0, top_k=514)
    states.set(0, spec, 1, 516)
    states.set(1, spec, 1)
    arrays = states.collect(np.array([0, 1], dtype=np.int32), np.array([1, 1], dtype=np.int32))
    assert arrays["forbidden_ids"].tolist() == [511, 515, 511]
    assert (arrays["cut_rows"].tolist(), arrays["top_k"].tolist()) == ([0], [514])
    allowed = replace(sampling_spec(), allowed_token_ids=int_array([511, 515, 516]))
    states.set(0, allowed, 1, 516)
    states.set(1, allowed, 1)
    masks = states.collect(np.array([1, 0], dtype=np.int32), np.array([1, 1], dtype=np.int32))
    assert masks["masks"].shape == (2, 17)
    assert masks["masks"][:, 16].tolist() == [0, 1 << 3]
