"""Finds and checks the tensors of an adapter that change the token embedding or the head."""

import re
from dataclasses import dataclass

from loraplex.engine.adapters.peft_config import ALL_LINEAR, PeftConfig, PeftConfigError
from loraplex.engine.adapters.safetensors_file import TensorPlace
from loraplex.engine.adapters.target import AdapterTarget, VocabularyTarget
from loraplex.engine.adapters.vocabulary.options import EMBEDDING, HEAD

_MODULE = re.compile(r"base_model\.model\.(model\.embed_tokens|lm_head)\.(.+)")
_PARTS = {
    "A": re.compile(r"lora_(?:embedding_A(?:\.default)?|A(?:\.default)?\.weight)"),
    "B": re.compile(r"lora_(?:embedding_B(?:\.default)?|B(?:\.default)?\.weight)"),
    "rows": re.compile(r"token_adapter\.trainable_tokens_delta(?:\.default)?"),
    "matrix": re.compile(r"(?:base_layer\.|token_adapter\.base_layer\.)?weight"),
    "saved": re.compile(r"modules_to_save\.(?:default\.)?weight"),
    "unused": re.compile(r"(?:token_adapter\.trainable_tokens_original|original_module)\..+"),
}
_TEXTS = {"A": "lora_A", "B": "lora_B", "rows": "token rows", "matrix": "weights"}
_UNSAVED = (
    "save it with save_pretrained(..., save_embedding_layers=False) if only LoRA was trained there"
)

Found = dict[str, dict[str, TensorPlace]]  # by module, then by the names of _PARTS


@dataclass(frozen=True, slots=True)
class MatrixTensors:
    """The tensors that change the embedding or the head.

    Attributes:
        name: of the module in Hugging Face's models.
        by_token, by_feature: U and V of memory/vocabulary_part.py, each maybe transposed; None: no
            LoRA.
        rank: the LoRA rank.
        matrix: all rows, which may differ from the base's.
        rows: the rows of `token_ids`.
    """

    name: str
    by_token: TensorPlace | None = None
    by_feature: TensorPlace | None = None
    rank: int = 0
    matrix: TensorPlace | None = None
    rows: TensorPlace | None = None
    token_ids: tuple[int, ...] = ()

    @property
    def is_transposed(self) -> bool:
        """Returns whether U and V lie as [rank, vocabulary] and [hidden, rank]."""
        return self.name == EMBEDDING


@dataclass(frozen=True, slots=True)
class VocabularyTensors:
    """The tensors of both.

    Attributes:
        shares_rows: the rows of the embedding are the head's, too.
        num_tokens: the size of the adapter's vocabulary; 0: the base model's.
    """

    embedding: MatrixTensors
    head: MatrixTensors
    shares_rows: bool = False
    num_tokens: int = 0


def split_tensors(tensors: dict[str, TensorPlace]) -> tuple[dict[str, TensorPlace], Found]:
    """Returns the tensors of layers by key, and those of the embedding and the head.

    Raises:
        PeftConfigError: one of the latter is of an unknown kind.
    """
    of_layers: dict[str, TensorPlace] = {}
    found: Found = {EMBEDDING: {}, HEAD: {}}
    for key, place in tensors.items():
        match = _MODULE.fullmatch(key)
        if match is None:
            of_layers[key] = place
            continue
        part = next((name for name, p in _PARTS.items() if p.fullmatch(match[2])), None)
        if part is None:
            raise PeftConfigError(
                f"tensor {key}: of {match[1]} only LoRA and rows of tokens are supported, not "
                "DoRA or biases"
            )
        if part in found[match[1]]:
            raise PeftConfigError(f"tensor {key} is there twice")
        if part != "unused":
            found[match[1]][part] = place
    for parts in found.values():
        saved = parts.pop("saved", None)
        if saved is not None:  # PEFT writes a copy beside it where it saves embedding layers
            parts.setdefault("matrix", saved)
    return of_layers, found


def check_vocabulary(
    found: Found, config: PeftConfig, target: AdapterTarget
) -> VocabularyTensors | None:
    """Returns the tensors, or None if the adapter changes the layers alone.

    Raises:
        PeftConfigError: they do not agree with the configuration or the base model, or are of a
            kind that is not supported.
    """
    targeted = {name: _is_targeted(config, name) for name in (EMBEDDING, HEAD)}
    indices = dict(config.token_indices)
    used = [name for name, is_used in targeted.items() if is_used]
    used += [*indices, *config.saved_modules, *(name for name, parts in found.items() if parts)]
    if not used:
        return None
    sizes = target.vocabulary
    if sizes is None:
        raise PeftConfigError(f"it changes {used[0]}: that is not supported here")
    _refuse_combinations(config, used[0])
    is_tied_lora = config.ties_weights and sizes.is_tied and targeted[EMBEDDING]
    shares_indices = (
        sizes.is_tied and EMBEDDING in indices and indices.get(HEAD) in (None, indices[EMBEDDING])
    )
    if shares_indices:
        indices.pop(HEAD, None)
        found = {**found, HEAD: {k: v for k, v in found[HEAD].items() if k in ("A", "B")}}
    num_tokens = _num_tokens(found, indices, sizes)
    checked = {
        name: _check_matrix(
            name,
            found[name],
            config,
            target,
            is_targeted=targeted[name] or (name == HEAD and is_tied_lora),
            token_ids=indices.get(name, ()),
            num_tokens=num_tokens,
        )
        for name in (EMBEDDING, HEAD)
    }
    embedding, head = checked[EMBEDDING], checked[HEAD]
    # A resized or wrapped embedding is the weight of a tied head, a saved one is a copy.
    shares_matrix = (
        sizes.is_tied
        and embedding.matrix is not None
        and head.matrix is None
        and EMBEDDING not in config.saved_modules
    )
    if shares_indices and head.rank:
        raise PeftConfigError(
            "trainable_token_indices beside LoRA on a head that is tied to the embedding: PEFT "
            "does not define their sum; train one of them"
        )
    shares_rows = shares_indices or shares_matrix
    for matrix in (embedding,) if shares_rows else (embedding, head):
        _check_added(matrix, num_tokens, sizes)
    num_own = num_tokens if num_tokens != sizes.tokens.total else 0
    return VocabularyTensors(embedding, head, shares_rows=shares_rows, num_tokens=num_own)


def _num_tokens(found: Found, indices: dict[str, tuple[int, ...]], sizes: VocabularyTarget) -> int:
    """Returns the size of the adapter's vocabulary.

    The rows of whole matrices tell it. Without them it is the base's, and larger if
    trainable_token_indices name tokens behind it.
    """
    saved = {name: parts["matrix"].shape[0] for name, parts in found.items() if "matrix" in parts}
    if len(set(saved.values())) > 1:
        counts = " and ".join(f"{name} {count}" for name, count in saved.items())
        raise PeftConfigError(f"the matrices have different numbers of tokens: {counts}")
    listed = [token + 1 for ids in indices.values() for token in ids]
    num_tokens = max(listed, default=0)
    if not saved:
        return max(sizes.tokens.total, num_tokens)
    (count,) = set(saved.values())
    if num_tokens > count:
        raise PeftConfigError(
            f"trainable_token_indices names token {num_tokens - 1}, but the file has {count} tokens"
        )
    return count


def _check_added(matrix: MatrixTensors, num_tokens: int, sizes: VocabularyTarget) -> None:
    """Raises PeftConfigError unless there is a row for each token that the base model lacks."""
    num_base = sizes.tokens.total
    check_num_rows(matrix.name, num_tokens - num_base, sizes)
    if matrix.matrix is not None:
        return
    missing = set(range(num_base, num_tokens)).difference(matrix.token_ids)
    if missing:
        raise PeftConfigError(
            f"the adapter has {num_tokens} tokens and this base model {num_base}, but the file has "
            f"no row of {matrix.name} for token {min(missing)}; name it in "
            "modules_to_save, or save the adapter with save_embedding_layers=True"
        )


def _is_targeted(config: PeftConfig, name: str) -> bool:
    return config.target_modules != ALL_LINEAR and config.targets(name)


def _refuse_combinations(config: PeftConfig, name: str) -> None:
    if config.invocation_tokens:
        raise PeftConfigError(
            f"alora_invocation_tokens beside a change of {name} is not supported; train the "
            "projections of the layers alone"
        )


def _check_matrix(
    name: str,
    parts: dict[str, TensorPlace],
    config: PeftConfig,
    target: AdapterTarget,
    *,
    is_targeted: bool,
    token_ids: tuple[int, ...],
    num_tokens: int,
) -> MatrixTensors:
    assert target.vocabulary is not None
    wanted = {"A", "B"} if is_targeted else set()
    wanted |= {"rows"} if token_ids else set()
    wanted |= {"matrix"} if name in config.saved_modules else set()
    for part in sorted(wanted - parts.keys()):
        raise PeftConfigError(
            f"the config says that {name} is trained, but the file has no {_TEXTS[part]} of it"
        )
    for part in sorted(parts.keys() - wanted - {"matrix"}):
        raise PeftConfigError(f"the file has {_TEXTS[part]} of {name}, which the config leaves out")
    for part, place in parts.items():
        if len(place.shape) != 2 or not place.dtype.is_floating_point:
            raise PeftConfigError(f"{name}: {part} is no matrix of floating-point numbers")
    if is_targeted and token_ids:
        raise PeftConfigError(
            f"{name} has LoRA and trainable_token_indices; train it with one of them"
        )
    rank = 0
    if is_targeted:
        rank = _check_low_rank(name, parts, config, target, num_tokens)
    if token_ids:
        _check_rows(name, parts["rows"], token_ids, target.vocabulary)
    if "matrix" in parts:
        _check_width(name, parts["matrix"], target.vocabulary)
    is_embedding = name == EMBEDDING
    return MatrixTensors(
        name=name,
        by_token=parts.get("A" if is_embedding else "B"),
        by_feature=parts.get("B" if is_embedding else "A"),
        rank=rank,
        matrix=parts.get("matrix"),
        rows=parts.get("rows"),
        token_ids=token_ids,
    )


def _check_low_rank(
    name: str,
    parts: dict[str, TensorPlace],
    config: PeftConfig,
    target: AdapterTarget,
    num_tokens: int,
) -> int:
    """Returns the rank."""
    if config.use_dora or config.lora_bias:
        option = "use_dora" if config.use_dora else "lora_bias"
        raise PeftConfigError(
            f"{option} on {name} is not supported; leave {name} out of target_modules"
        )
    assert target.vocabulary is not None
    rank = config.rank_of(name)
    inputs, outputs = num_tokens, target.vocabulary.hidden_size
    if name == HEAD:
        inputs, outputs = outputs, inputs
    shapes = parts["A"].shape, parts["B"].shape
    if shapes != ((rank, inputs), (outputs, rank)):
        raise PeftConfigError(
            f"{name} has A {list(shapes[0])} and B {list(shapes[1])}, but rank {rank} in the "
            f"config and this base model ask for {[rank, inputs]} and {[outputs, rank]}"
        )
    if rank > target.max_rank:
        raise PeftConfigError(f"{name} has rank {rank}, above max_lora_rank {target.max_rank}")
    return rank


def _check_rows(
    name: str, rows: TensorPlace, token_ids: tuple[int, ...], sizes: VocabularyTarget
) -> None:
    if rows.shape != (len(token_ids), sizes.hidden_size):
        raise PeftConfigError(
            f"{name} has rows {list(rows.shape)}, not {[len(token_ids), sizes.hidden_size]}"
        )
    check_num_rows(name, len(token_ids), sizes)


def _check_width(name: str, matrix: TensorPlace, sizes: VocabularyTarget) -> None:
    num_features = matrix.shape[1]
    if num_features != sizes.hidden_size:
        raise PeftConfigError(
            f"{name} has rows of {num_features} numbers in the adapter and {sizes.hidden_size} in "
            "this base model: it was trained on another base"
        )


def check_num_rows(name: str, num_rows: int, sizes: VocabularyTarget) -> None:
    """Raises PeftConfigError if so many rows may not be replaced."""
    if num_rows > sizes.max_rows:
        raise PeftConfigError(
            f"{num_rows} rows of {name} differ from the base model's, above max_token_rows "
            f"{sizes.max_rows}; raise max_token_rows; {_UNSAVED}"
        )
