"""Adapters whose vocabulary is larger or smaller than the base model's."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loraplex.engine.adapters.peft_files import WEIGHTS_FILE, read_adapter
from loraplex.engine.adapters.reader import ProcessReader
from loraplex.engine.errors import AdapterError
from loraplex.engine.model.shard import Piece
from loraplex.memory.host.slab import shared_slab
from loraplex.memory.host.store import HostStore, PackedAdapter
from loraplex.memory.vocabulary_part import VocabularyPart, stretch_elems

from helpers.models.hf_models import make_hf_model
from helpers.models.peft_folders import edit_config, edit_weights
from helpers.models.vocabulary_adapters import EMBEDDING, HEAD, target_of
from helpers.vocabularies.resized_models import make_resized_adapter

RANK = {"r": 4, "alpha": 8}
BOTH = ["embed_tokens", "lm_head"]
ADDED = tuple(range(512, 516))
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (516, {"targets": ["q_proj"]}),
    "saved": (516, {"targets": ["q_proj"], "modules_to_save": BOTH}),
    "lora": (516, {"targets": ["q_proj", *BOTH]}),
    "tokens": (516, {"targets": ["q_proj"], "trainable_token_indices": [3, *ADDED]}),
    "fewer": (505, {"targets": ["q_proj"]}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resized")
    make_hf_model("llama", root / "base")
    for name, (num_tokens, options) in KINDS.items():
        make_resized_adapter(root / "base", root / name, num_tokens, **RANK, **options)
    return root


def read(folders: Path, name: str, **changes: Any) -> PackedAdapter:
    return read_adapter("mine", folders / name, target_of(folders / "base", **changes))


def copy(folder: Path, into: Path) -> Path:
    return Path(shutil.copytree(folder, into / "copy"))


def rows(packed: PackedAdapter, part: VocabularyPart | None) -> torch.Tensor:
    assert part is not None
    count = len(part.token_ids)
    stretch = stretch_elems(count * 64, len(packed.data))
    return (
        packed.data[:, part.row_start : part.row_start + stretch]
        .reshape(-1)[: count * 64]
        .view(count, 64)
    )


@pytest.mark.parametrize("name", ["plain", "saved", "lora"])
def test_the_rows_of_added_tokens(folders: Path, name: str) -> None:
    packed, tensors = read(folders, name), load_file(folders / name / WEIGHTS_FILE)
    parts = packed.vocabulary
    assert parts.num_tokens == 516
    assert packed.kind == ("lora+embedding+head+tokens" if name == "lora" else "lora+tokens")
    for part, prefix in ((parts.embedding, EMBEDDING), (parts.head, HEAD)):
        assert part is not None and part.token_ids == ADDED
        infix = "base_layer." if name == "lora" else ""
        expected = tensors[f"{prefix}{infix}weight"][512:]
        if name == "lora" and prefix == HEAD:
            b, a = tensors[HEAD + "lora_B.weight"], tensors[HEAD + "lora_A.weight"]
            expected = expected + 2 * b[512:] @ a
        elif name == "lora":
            a, b = tensors[EMBEDDING + "lora_embedding_A"], tensors[EMBEDDING + "lora_embedding_B"]
            expected = expected + 2 * a.t()[512:] @ b.t()
        torch.testing.assert_close(rows(packed, part), expected)


def test_listed_tokens_beside_the_whole_matrices(folders: Path) -> None:
    packed, tensors = read(folders, "tokens"), load_file(folders / "tokens" / WEIGHTS_FILE)
    parts = packed.vocabulary
    assert parts.num_tokens == 516 and parts.embedding is not None and parts.head is not None
    assert parts.embedding.token_ids == (3, *ADDED) and parts.head.token_ids == ADDED
    expected = tensors[EMBEDDING + "token_adapter.trainable_tokens_delta"]
    assert torch.equal(rows(packed, parts.embedding), expected)


def test_listed_tokens_alone_tell_the_size(folders: Path, tmp_path: Path) -> None:
    """A trainer sends no whole matrices. The head is tied."""
    folder = copy(folders / "tokens", tmp_path)
    edit_weights(folder, lambda t: [t.pop(name) for name in list(t) if name.endswith("weight")
                                    and ("embed_tokens" in name or "lm_head" in name)])  # fmt: skip
    with pytest.raises(AdapterError, match="no row of lm_head for token 512"):
        read_adapter("mine", folder, target_of(folders / "base"))
    parts = read_adapter("mine", folder, target_of(folders / "base", is_tied=True)).vocabulary
    assert parts.num_tokens == 516 and parts.embedding is not None and parts.head is not None
    assert parts.head.token_ids == parts.embedding.token_ids == (3, *ADDED)


def test_fewer_tokens(folders: Path) -> None:
    packed = read(folders, "fewer")
    assert packed.vocabulary.num_tokens == 505
    assert packed.vocabulary.embedding is packed.vocabulary.head is None
    assert packed.kind == "lora+tokens"  # so that no mix has it
    hashes = {name: read(folders, name).content_hash for name in KINDS}
    assert hashes["plain"] == hashes["saved"]  # the same rows
    assert len(set(hashes.values())) == len(KINDS) - 1


def test_all_ranks_have_the_rows(folders: Path) -> None:
    pieces = [Piece(0, 256, 256, 512), Piece(256, 512, 256, 512)]
    first, second = (read(folders, "lora", tokens=piece) for piece in pieces)
    assert first.content_hash == second.content_hash == read(folders, "lora").content_hash
    assert first.vocabulary == second.vocabulary
    for part in (first.vocabulary.embedding, first.vocabulary.head):
        assert torch.equal(rows(first, part), rows(second, part))


def test_the_process_that_reads_tells_the_size(folders: Path) -> None:
    store = HostStore(1 << 22, make_slab=partial(shared_slab, page_locked=False))
    reader = ProcessReader(target_of(folders / "base"))
    try:
        got = store.add(lambda allocate: reader.read("mine", folders / "saved", allocate))
    finally:
        reader.close()
    assert got.vocabulary == read(folders, "saved").vocabulary


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("name", "edit", "sizes", "reason"),
    [
        (
            "plain",
            drop(HEAD + "weight"),
            {},
            "no row of lm_head for token 512; name it in modules_to",
        ),
        ("plain", drop(EMBEDDING + "weight"), {}, "no row of model.embed_tokens for token 512"),
        (
            "plain",
            lambda t: t.update({HEAD + "weight": t[HEAD + "weight"][:514]}),
            {},
            "different numbers of tokens: model.embed_tokens 516 and lm_head 514",
        ),
        ("plain", lambda t: None, {"max_rows": 3}, "4 rows of model.embed_tokens.*rows 3"),
        ("lora", lambda t: None, {"hidden_size": 65}, "this base model ask for"),
    ],
)
def test_refused(
    folders: Path, tmp_path: Path, name: str, edit: Any, sizes: Any, reason: str
) -> None:
    folder = copy(folders / name, tmp_path)
    edit_weights(folder, edit)
    with pytest.raises(AdapterError, match=f"adapter 'mine': .*{reason}"):
        read_adapter("mine", folder, target_of(folders / "base", **sizes))


def test_a_listed_token_behind_the_matrices(folders: Path, tmp_path: Path) -> None:
    folder = copy(folders / "tokens", tmp_path)
    edit_config(folder, trainable_token_indices=[3, 512, 513, 514, 516])
    with pytest.raises(AdapterError, match="names token 516, but the file has 516 tokens"):
        read_adapter("mine", folder, target_of(folders / "base"))
