"""The changes of embedding and head for the rows of a step, against merged matrices in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from loraplex.engine.adapters.peft_files import read_adapter
from loraplex.engine.adapters.table import AdapterTable, group_rows
from loraplex.engine.model.shard import Piece
from loraplex.engine.worker.adapters.vocabulary_rows import VocabularyReader, VocabularyStep
from loraplex.engine.worker.step_rows import StepRows

from helpers.models.hf_models import make_hf_model
from helpers.models.vocabulary_adapters import make_changed_adapter, merged, target_of

DEVICES = [
    ("cpu", torch.float32),
    ("cpu", torch.bfloat16),
    pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
]
SHARDS = {
    "one": [Piece(0, 512, 512, 512)],
    "two": [Piece(0, 300, 300, 512), Piece(300, 512, 300, 512)],
}
SLOT = 1
NUM_TOKENS = np.array([4, 1, 5, 1], dtype=np.int32)
ADAPTER_SLOTS = np.array([SLOT, -1, 0, SLOT], dtype=np.int32)  # slot 0 changes layers alone
SAMPLING = np.array([0, 1, 3])
TOKEN_IDS = [3, 9, 10, 500, 3, 9, 3, 0, 1, 2, 511]
OF_ADAPTER = [0, 1, 2, 3, 10]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    path = tmp_path_factory.mktemp("base")
    return path, make_hf_model("llama", path)


@pytest.fixture(scope="module")
def folder(model: tuple[Path, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_changed_adapter(model[1], tmp_path_factory.mktemp("adapters") / "changed")


def step_rows() -> StepRows:
    starts = np.concatenate(([0], np.cumsum(NUM_TOKENS)))
    zeros = np.zeros(4, dtype=np.int32)
    last = starts[1:][SAMPLING] - 1
    return StepRows(zeros, zeros, NUM_TOKENS, starts, SAMPLING, last, NUM_TOKENS[SAMPLING])


def make_reader(
    base: Path, folder: Path, piece: Piece, device: str, dtype: torch.dtype
) -> VocabularyReader:
    """Returns a reader of the adapter, whose pages lie scattered in a pool of other numbers."""
    target = target_of(base, dtype, tokens=piece)
    packed = read_adapter("changed", folder, target)
    table = AdapterTable(target, 3, torch.device(device))
    page_ids = torch.randperm(packed.num_pages + 5)[: packed.num_pages] + 1
    pool = torch.full((3, packed.num_pages + 7, target.page_elems), torch.nan, dtype=dtype)
    pool[:, page_ids] = packed.data.view(3, packed.num_pages, -1)
    table.write_device(SLOT, packed, page_ids.int().to(device))
    table.write_host(SLOT, packed, page_ids.int())
    assert table.vocabulary is not None
    return VocabularyReader(pool.to(device), table.table, table.vocabulary)


def plan(reader: VocabularyReader) -> VocabularyStep:
    step = reader.plan(group_rows(ADAPTER_SLOTS, NUM_TOKENS), step_rows())
    assert step is not None
    return step


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("shards", SHARDS)
def test_embeddings(
    model: tuple[Path, PreTrainedModel],
    folder: Path,
    device: str,
    dtype: torch.dtype,
    shards: str,
) -> None:
    token_ids = torch.tensor(TOKEN_IDS, device=device)
    base = model[1].get_input_embeddings().weight.detach().to(device, dtype)
    total = torch.zeros(len(TOKEN_IDS), 64, dtype=dtype, device=device)
    for piece in SHARDS[shards]:
        is_own = (token_ids >= piece.start) & (token_ids < piece.stop)
        out = base[token_ids] * is_own[:, None]
        plan(make_reader(model[0], folder, piece, device, dtype)).tokens.embed(token_ids, out)
        total += out
    expected = base[token_ids].double().cpu()
    expected[OF_ADAPTER] = merged(folder)[0][TOKEN_IDS][OF_ADAPTER]
    others = [i for i in range(len(TOKEN_IDS)) if i not in OF_ADAPTER]
    assert torch.equal(total.cpu()[others].double(), expected[others])
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(total.cpu().double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("shards", SHARDS)
def test_logits(
    model: tuple[Path, PreTrainedModel],
    folder: Path,
    device: str,
    dtype: torch.dtype,
    shards: str,
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(SAMPLING), 64, generator=generator).to(device, dtype)
    base = model[1].get_output_embeddings().weight.detach().to(device, dtype)
    parts = []
    for piece in SHARDS[shards]:
        own = torch.zeros(piece.size, 64, dtype=dtype, device=device)
        own[: piece.stop - piece.start] = base[piece.start : piece.stop]
        logits = hidden @ own.t()
        plan(make_reader(model[0], folder, piece, device, dtype)).samples.score(hidden, logits)
        parts.append(logits)
    got = torch.cat(parts, dim=1)[:, :512].cpu()
    expected = hidden.cpu().double() @ base.cpu().double().t()
    changed = hidden.cpu().double() @ merged(folder)[1].t()
    expected[[0, 2]] = changed[[0, 2]]
    tolerance = 1e-4 if dtype is torch.float32 else 6e-2
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_all_rows_of_one_adapter(model: tuple[Path, PreTrainedModel], folder: Path) -> None:
    reader = make_reader(model[0], folder, SHARDS["one"][0], "cpu", torch.float32)
    hidden = torch.randn(5, 64)
    logits = hidden @ model[1].get_output_embeddings().weight.detach().t()
    change = reader.all_rows(SLOT, 5)
    assert change is not None
    change.score(hidden, logits)
    expected = hidden.double() @ merged(folder)[1].t()
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)
    assert reader.all_rows(-1, 5) is None
    assert reader.all_rows(0, 5) is None


def test_steps_without_a_change(model: tuple[Path, PreTrainedModel], folder: Path) -> None:
    reader = make_reader(model[0], folder, SHARDS["one"][0], "cpu", torch.float32)
    slots = np.array([0, -1, 0, 2], dtype=np.int32)
    assert reader.plan(group_rows(slots, NUM_TOKENS), step_rows()) is None
    reader.resident.clear(SLOT)
    assert reader.plan(group_rows(ADAPTER_SLOTS, NUM_TOKENS), step_rows()) is None
