"""Adapters that change the token embedding or the head: what is read, and what is refused."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from loraplex.engine.adapters.peft_files import WEIGHTS_FILE, read_adapter
from loraplex.engine.adapters.reader import ProcessReader
from loraplex.engine.adapters.target import AdapterTarget
from loraplex.engine.errors import AdapterError
from loraplex.engine.model.shard import Piece
from loraplex.memory.host.slab import shared_slab
from loraplex.memory.host.store import HostStore, PackedAdapter
from loraplex.memory.vocabulary_part import VocabularyPart, stretch_elems

from helpers.models.hf_models import make_hf_model
from helpers.models.peft_adapters import make_adapter
from helpers.models.peft_folders import edit_config, edit_weights
from helpers.models.vocabulary_adapters import EMBEDDING, HEAD, TOKENS, change_base_rows
from helpers.models.vocabulary_adapters import target_of as target_in

RANK = {"r": 4, "alpha": 8}
KINDS: dict[str, dict[str, Any]] = {
    "head": {**RANK, "targets": ["q_proj", "lm_head"]},
    "embedding": {**RANK, "targets": ["q_proj", "embed_tokens"]},
    "tokens": {**RANK, "targets": ["q_proj"], "trainable_token_indices": [9, 3, 500]},
    "saved": {
        **RANK, "targets": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"],
        "saved_tokens": (9, 3, 500),
    },
    "wrapped": {
        **RANK, "targets": ["embed_tokens", "lm_head"], "save_embedding_layers": "auto",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    path = tmp_path_factory.mktemp("base")
    return path, make_hf_model("llama", path)


@pytest.fixture
def make(base: tuple[Path, PreTrainedModel], tmp_path: Path) -> Callable[..., Path]:
    def make_kind(kind: str, **options: Any) -> Path:
        return make_adapter(base[1], tmp_path / kind, **{**KINDS[kind], **options})

    return make_kind


def target_of(model: tuple[Path, PreTrainedModel], **changes: Any) -> AdapterTarget:
    return target_in(model[0], **changes)


def matrix(packed: PackedAdapter, start: int, rows: int, width: int) -> torch.Tensor:
    """Returns a matrix of the vocabulary from the stretches of the layers."""
    stretch = stretch_elems(rows * width, len(packed.data))
    flat = packed.data[:, start : start + stretch].reshape(-1)
    return flat[: rows * width].view(rows, width)


@pytest.mark.parametrize(
    ("kind", "name", "modules"),
    [
        ("head", "lora+head", ("head",)),
        ("embedding", "lora+embedding", ("embedding",)),
        ("tokens", "lora+tokens", ("embedding",)),
        ("saved", "lora+tokens", ("embedding", "head")),
        ("wrapped", "lora+embedding+head", ("embedding", "head")),
    ],
)
def test_kinds(base: Any, make: Any, kind: str, name: str, modules: tuple[str, ...]) -> None:
    packed = read_adapter("mine", make(kind), target_of(base))
    assert packed.kind == name
    parts = packed.vocabulary
    assert tuple(m for m in ("embedding", "head") if getattr(parts, m) is not None) == modules


def test_the_matrices_in_the_pages(base: Any, make: Any) -> None:
    folder = make("wrapped")
    tensors, packed = (
        load_file(folder / WEIGHTS_FILE),
        read_adapter("mine", folder, target_of(base)),
    )
    embedding, head = packed.vocabulary.embedding, packed.vocabulary.head
    assert embedding is not None and head is not None
    assert embedding.scale == head.scale == 2.0
    for part, prefix, by_token, by_feature in (
        (embedding, EMBEDDING, "lora_embedding_A", "lora_embedding_B"),
        (head, HEAD, "lora_B.weight", "lora_A.weight"),
    ):
        u, v = tensors[prefix + by_token], tensors[prefix + by_feature]
        if part is embedding:
            u, v = u.t(), v.t()
        assert torch.equal(matrix(packed, part.token_start, 512, 4), u)
        assert torch.equal(matrix(packed, part.feature_start, 4, 64), v)


@pytest.mark.parametrize("kind", ["tokens", "saved"])
def test_rows_ascend_by_token(base: Any, make: Any, kind: str) -> None:
    folder = make(kind)
    tensors, packed = (
        load_file(folder / WEIGHTS_FILE),
        read_adapter("mine", folder, target_of(base)),
    )
    part = packed.vocabulary.embedding
    assert part is not None and part.token_ids == (3, 9, 500)
    if kind == "saved":
        expected = tensors[EMBEDDING + "weight"][[3, 9, 500]]
    else:
        expected = tensors[EMBEDDING + "token_adapter.trainable_tokens_delta"][[1, 0, 2]]
    assert torch.equal(matrix(packed, part.row_start, 3, 64), expected)


def test_a_rank_packs_its_tokens(base: Any, make: Any) -> None:
    folder = make("wrapped", trainable_token_indices=None)
    tensors = load_file(folder / WEIGHTS_FILE)
    u = tensors[HEAD + "lora_B.weight"]
    hashes = []
    for piece, own in (
        (Piece(0, 300, 300, 512), u[:300]),
        (Piece(300, 512, 300, 512), torch.cat((u[300:], torch.zeros(88, 4)))),
    ):
        packed = read_adapter("mine", folder, target_of(base, tokens=piece))
        head = packed.vocabulary.head
        assert head is not None
        assert torch.equal(matrix(packed, head.token_start, 300, 4), own)
        hashes.append((packed.content_hash, packed.num_pages))
    assert hashes[0] == hashes[1]
    assert hashes[0][0] == read_adapter("mine", folder, target_of(base)).content_hash


def test_a_matrix_that_equals_the_base_is_no_change(base: Any, make: Any) -> None:
    """PEFT saves the base's weights beside LoRA on the embedding, but the identity is LoRA's."""
    target = target_of(base)
    with_base = read_adapter("mine", make("wrapped"), target)
    without = read_adapter("mine", make("wrapped", save_embedding_layers=False), target)
    assert with_base.content_hash == without.content_hash
    saved = read_adapter("mine", make("saved", saved_tokens=()), target)
    assert saved.vocabulary.kinds == ""
    assert saved.kind == "lora"


@pytest.mark.parametrize("is_tied", [False, True])
def test_rows_of_a_tied_embedding_are_the_heads(base: Any, make: Any, is_tied: bool) -> None:
    parts = read_adapter("mine", make("tokens"), target_of(base, is_tied=is_tied)).vocabulary
    assert (parts.head is not None) is is_tied
    if is_tied:
        assert isinstance(parts.head, VocabularyPart) and parts.embedding is not None
        assert parts.head.token_ids == parts.embedding.token_ids
        assert parts.head.row_start == parts.embedding.row_start


def test_every_part_has_a_say_in_the_identity(base: Any, make: Any) -> None:
    target, hashes = target_of(base), set()
    edits: list[Callable[[Path], None]] = [
        lambda folder: None,
        lambda folder: edit_config(folder, lora_alpha=9),
        lambda folder: edit_config(folder, trainable_token_indices=[9, 3, 501]),
        lambda folder: edit_weights(
            folder, lambda t: t[EMBEDDING + "token_adapter.trainable_tokens_delta"].add_(1)
        ),
    ]
    for edit in edits:
        folder = make("tokens")
        edit(folder)
        hashes.add(read_adapter("mine", folder, target).content_hash)
    head = read_adapter("mine", make("head"), target).content_hash
    assert len(hashes | {head}) == len(edits) + 1


def test_changed_base_rows_beside_lora(base: Any, make: Any) -> None:
    folder = make("wrapped")
    change_base_rows(folder)
    packed = read_adapter("mine", folder, target_of(base))
    assert packed.kind == "lora+embedding+head+tokens"
    for part in (packed.vocabulary.embedding, packed.vocabulary.head):
        assert part is not None and (part.rank, part.token_ids) == (4, TOKENS)


def test_the_process_that_reads_gives_the_same(base: Any, make: Any) -> None:
    folder, target = make("wrapped"), target_of(base)
    change_base_rows(folder)
    expected = read_adapter("mine", folder, target)
    store = HostStore(1 << 22, make_slab=partial(shared_slab, page_locked=False))
    reader = ProcessReader(target)
    try:
        got = store.add(lambda allocate: reader.read("mine", folder, allocate))
    finally:
        reader.close()
    assert (got.content_hash, got.vocabulary) == (expected.content_hash, expected.vocabulary)
    assert torch.equal(got.data, expected.data)


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("tokens", {}, {"max_rows": 2}, "3 rows of model.embed_tokens differ.*max_token_rows 2"),
    ("saved", {}, {"max_rows": 2}, "3 rows of model.embed_tokens differ.*max_token_rows 2"),
    ("saved", {}, {"base": ""}, "all rows of model.embed_tokens, and the base model's are random"),
    ("saved", {}, {"base": "/absent"}, "cannot be compared with the base"),
    (
        "tokens",
        {"trainable_token_indices": [9, 3, 512]},
        {},
        "513 tokens and this base model 512, but the file has no row of lm_head for token 512",
    ),
    ("tokens", {"trainable_token_indices": [9, 3]}, {}, r"rows \[3, 64\], not \[2, 64\]"),
    ("tokens", {"trainable_token_indices": [9, 9, 3]}, {}, "name a token twice"),
    ("tokens", {"trainable_token_indices": [-1]}, {}, "lists of token ids"),
    ("tokens", {"trainable_token_indices": {"norm": [1]}}, {}, "trainable_token_indices.*norm"),
    ("tokens", {"trainable_token_indices": None}, {}, "token rows of model.embed_tokens, which"),
    ("head", {"r": 3, "rank_pattern": {"q_proj": 4}}, {}, "but rank 3 in the config"),
    ("head", {"use_dora": True}, {}, "use_dora on lm_head is not supported"),
    ("head", {"lora_bias": True}, {}, "lora_bias on lm_head is not supported"),
    ("head", {"alora_invocation_tokens": [5]}, {}, "alora_invocation_tokens beside"),
    ("head", {"target_modules": ["q_proj"]}, {}, "lora_A of lm_head, which the config leaves out"),
    (
        "embedding",
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {},
        "lm_head is train",
    ),
    ("head", {}, {"hidden_size": 65}, "this base model ask for"),
    ("saved", {}, {"hidden_size": 65}, "65 in this base model.*another base"),
    ("saved", {}, {"tokens": Piece(0, 500, 500, 500)}, "12 rows of model.embed_tokens.*rows 8"),
]


@pytest.mark.parametrize(("kind", "config", "sizes", "reason"), REFUSED)
def test_refused(
    base: Any, make: Any, kind: str, config: dict[str, Any], sizes: dict[str, Any], reason: str
) -> None:
    folder = make(kind)
    edit_config(folder, **config)
    with pytest.raises(AdapterError, match=rf"adapter 'mine': .*{reason}"):
        read_adapter("mine", folder, target_of(base, **sizes))


@pytest.mark.parametrize(
    ("kind", "tensor"),
    [
        ("head", HEAD + "lora_B.weight"),
        ("embedding", EMBEDDING + "lora_embedding_A"),
        ("tokens", EMBEDDING + "token_adapter.trainable_tokens_delta"),
        ("saved", HEAD + "weight"),
    ],
)
def test_numbers_that_are_not_finite(base: Any, make: Any, kind: str, tensor: str) -> None:
    folder = make(kind)
    edit_weights(folder, lambda tensors: tensors[tensor][2].fill_(torch.nan))
    with pytest.raises(AdapterError, match="holds NaN or infinite values"):
        read_adapter("mine", folder, target_of(base))


def test_other_parts_of_the_head(base: Any, make: Any) -> None:
    folder = make("head")
    edit_weights(folder, lambda t: t.update({HEAD + "lora_magnitude_vector": torch.ones(512)}))
    with pytest.raises(AdapterError, match="of lm_head only LoRA and rows of tokens"):
        read_adapter("mine", folder, target_of(base))
