"""The layout of an adapter's changes to the token embedding or to the head. Plain integers.

Both are matrices W [vocabulary, hidden]. An adapter replaces some rows of W, and then adds
s U V, with U [vocabulary, rank] and V [rank, hidden]. For PEFT's LoRA on an embedding U is A
transposed and V is B transposed; for LoRA on the head U is B and V is A.

These matrices belong to no layer. So each of them is cut into equal stretches, one for each layer:
stretch l lies in layer l of the adapter's pages, behind the segments of the layers
(memory/adapter_layout.py), at the same element in every layer. The pages are then as full as those
of an adapter of the layers alone.
"""

from dataclasses import dataclass

from loraplex.memory.adapter_layout import align


@dataclass(frozen=True, slots=True)
class VocabularyPart:
    """An adapter's change of the embedding or of the head.

    Attributes:
        rank: the LoRA rank; 0: nothing is added.
        scale: s.
        token_start: the element at which the stretches of U begin.
        feature_start: the same for V.
        row_start: the same for the rows that replace those of W, [len(token_ids), hidden].
        token_ids: the tokens of these rows, ascending.
    """

    rank: int = 0
    scale: float = 0.0
    token_start: int = 0
    feature_start: int = 0
    row_start: int = 0
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class VocabularyParts:
    """The change of the embedding and that of the head.

    Attributes:
        num_tokens: the size of the adapter's vocabulary; 0: the base model's.
    """

    embedding: VocabularyPart | None = None
    head: VocabularyPart | None = None
    num_tokens: int = 0

    @property
    def kinds(self) -> str:
        """Names what is changed, each behind a "+": "+embedding", "+head", "+tokens"."""
        parts = (self.embedding, self.head)
        names = zip(("+embedding", "+head"), parts, strict=True)
        low_rank = "".join(name for name, part in names if part and part.rank)
        has_tokens = self.num_tokens > 0 or any(part and part.token_ids for part in parts)
        return low_rank + "+tokens" * has_tokens


def stretch_elems(num_elems: int, num_layers: int) -> int:
    """Returns the elements of a matrix that lie in each layer, rounded up to an aligned row."""
    return align(-(-num_elems // num_layers))
