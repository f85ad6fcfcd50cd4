"""Which part of each weight one worker rank holds: Megatron's split (arXiv 1909.08053).

Column-parallel modules (q, k, v, gate, up) are split by output, row-parallel ones (o, down) by
input; embedding and head by vocabulary. A rank holds whole heads. Where there are fewer KV heads
than ranks, several ranks hold the same one. The feed-forward size and the vocabulary are padded
with zeros where the ranks do not divide them; zeros add nothing to any sum.
"""

from dataclasses import dataclass

from loraplex.engine.errors import ConfigError
from loraplex.engine.model.spec import ModelSpec
from loraplex.memory.adapter_layout import MODULES, ModuleShape

COLUMN_PARALLEL = frozenset({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"})
ROW_PARALLEL = frozenset({"o_proj", "down_proj"})
_VOCABULARY = frozenset({"embed_tokens", "lm_head"})


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements [start, stop) of an axis of `total`, held in `size` elements; the rest is zero."""

    start: int
    stop: int
    size: int
    total: int

    @property
    def is_whole(self) -> bool:
        return self.size == self.total


@dataclass(frozen=True, slots=True)
class Shard:
    """One worker rank's part of a model."""

    worker_rank: int
    world_size: int
    num_heads: int
    num_kv_heads: int
    query: Piece  # of the query heads' elements
    key: Piece  # of the key heads' elements, and of the value heads'
    inner: Piece  # of the feed-forward's
    vocabulary: Piece
    hidden: Piece  # all of it

    @property
    def shapes(self) -> tuple[ModuleShape, ...]:
        """Sizes of this rank's projections, in the order of MODULES."""
        return tuple(ModuleShape(ins.size, outs.size) for ins, outs in self.all_sides)

    @property
    def all_sides(self) -> tuple[tuple[Piece, Piece], ...]:
        """The pieces of each module's inputs and outputs, in the order of MODULES."""
        return tuple(map(self.sides, MODULES))

    def sides(self, module: str) -> tuple[Piece, Piece]:
        """Returns the pieces of a module's inputs and outputs."""
        hidden, inner = self.hidden, self.inner
        match module:
            case "q_proj":
                return hidden, self.query
            case "k_proj" | "v_proj":
                return hidden, self.key
            case "o_proj":
                return self.query, hidden
            case "gate_proj" | "up_proj":
                return hidden, inner
            case "down_proj":
                return inner, hidden
        raise ValueError(f"no module {module!r}")

    def pieces(self, name: str) -> tuple[Piece, ...] | None:
        """Returns the piece of each axis of a parameter, by its Hugging Face name.

        None: this rank holds none of it and zeros instead (the bias of a row-parallel module,
        which rank 0 alone adds).
        """
        *_, module, kind = name.split(".")
        if module in _VOCABULARY:
            return self.vocabulary, self.hidden
        if module in COLUMN_PARALLEL or module in ROW_PARALLEL:
            inputs, outputs = self.sides(module)
            if kind == "weight":
                return outputs, inputs
            if module in ROW_PARALLEL and self.worker_rank:
                return None
            return (outputs,)
        return ()


def whole_sides(shapes: tuple[ModuleShape, ...]) -> tuple[tuple[Piece, Piece], ...]:
    """Returns the pieces of modules that one worker holds whole."""
    return tuple(
        (_padded(shape.in_features, 0, 1), _padded(shape.out_features, 0, 1)) for shape in shapes
    )


def whole(spec: ModelSpec) -> Shard:
    """Returns the shard of a model on one worker."""
    return shard_of(spec, worker_rank=0, world_size=1)


def shard_of(spec: ModelSpec, *, worker_rank: int, world_size: int) -> Shard:
    """Returns the part of a worker rank among `world_size`.

    Raises:
        ConfigError: the heads cannot be dealt to so many ranks; the text names sizes that can.
    """
    heads, kv_heads = spec.num_heads, spec.num_kv_heads
    fits = [n for n in range(1, heads + 1) if _fits(spec, n)]
    if world_size not in fits:
        raise ConfigError(
            f"tensor_parallel_size {world_size} does not fit a model of {heads} heads and "
            f"{kv_heads} KV heads; use one of {', '.join(map(str, fits))}"
        )
    own_heads = heads // world_size
    own_kv = max(1, kv_heads // world_size)
    first_kv = worker_rank * kv_heads // world_size
    hidden = spec.hidden_size
    return Shard(
        worker_rank=worker_rank,
        world_size=world_size,
        num_heads=own_heads,
        num_kv_heads=own_kv,
        query=_heads(worker_rank * own_heads, own_heads, heads, spec.head_dim),
        key=_heads(first_kv, own_kv, kv_heads, spec.head_dim),
        inner=_padded(spec.intermediate_size, worker_rank, world_size),
        vocabulary=_padded(spec.vocab_size, worker_rank, world_size),
        hidden=Piece(0, hidden, hidden, hidden),
    )


def _fits(spec: ModelSpec, world_size: int) -> bool:
    heads, kv_heads = spec.num_heads, spec.num_kv_heads
    if heads % world_size:
        return False
    return kv_heads % world_size == 0 or world_size % kv_heads == 0


def _heads(first: int, count: int, total: int, head_dim: int) -> Piece:
    start, size = first * head_dim, count * head_dim
    return Piece(start, start + size, size, total * head_dim)


def _padded(total: int, worker_rank: int, world_size: int) -> Piece:
    """Returns an equal share of `total`, rounded up; the padding lies behind the last element."""
    size = -(-total // world_size)
    start = min(total, worker_rank * size)
    return Piece(start, min(total, start + size), size, total)
