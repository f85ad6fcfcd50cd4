"""Which part of each weight one worker rank holds: Megatron's split (arXiv 1909.08053).

Column-parallel modules (q, k, v, gate, up) are split by output, row-parallel ones (o, down) by
input; embedding and head by vocabulary. A rank holds whole heads. Where there are fewer KV heads
than ranks, several ranks hold the same one. The feed-forward size and the vocabulary are padded
with zeros where the ranks do not divide them; zeros add nothing to any sum.
"""

from dataclasses import dataclass

from loraplex.engine.errors import ConfigError
from loraplex.engine.model.modules import Axis, ModuleSpec, llama_modules
from loraplex.engine.model.spec import ModelSpec
from loraplex.memory.adapter_layout import ModuleShape

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
class ModuleShard:
    """One rank's part of a module that adapters may change."""

    spec: ModuleSpec
    inputs: Piece
    outputs: Piece

    @property
    def shape(self) -> ModuleShape:
        """The sizes of this rank's part."""
        return ModuleShape(self.inputs.size, self.outputs.size)

    @property
    def full_shape(self) -> ModuleShape:
        """The sizes of the whole module."""
        return ModuleShape(self.inputs.total, self.outputs.total)

    @property
    def adds_bias(self) -> bool:
        """Whether this rank adds biases: of the partial sums, only the first rank's has them."""
        return not self.spec.is_row_parallel or self.inputs.start == 0


@dataclass(frozen=True, slots=True)
class Shard:
    """One worker rank's part of a model."""

    spec: ModelSpec
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
    def modules(self) -> tuple[ModuleShard, ...]:
        """This rank's parts of the modules that adapters may change, in the order of their ids."""
        return tuple(
            ModuleShard(module, self.piece(module.inputs), self.piece(module.outputs))
            for module in self.spec.modules
        )

    @property
    def shapes(self) -> tuple[ModuleShape, ...]:
        """Sizes of this rank's modules, in the order of their ids."""
        return tuple(module.shape for module in self.modules)

    def piece(self, axis: Axis) -> Piece:
        """Returns this rank's piece of an axis."""
        pieces = {"hidden": self.hidden, "query": self.query, "key": self.key, "inner": self.inner}
        return pieces[axis]

    def pieces(self, name: str) -> tuple[Piece, ...] | None:
        """Returns the piece of each axis of a parameter, by its Hugging Face name.

        None: this rank holds none of it and zeros instead (the bias of a row-parallel module,
        which rank 0 alone adds).
        """
        *_, module, kind = name.split(".")
        if module in _VOCABULARY:
            return self.vocabulary, self.hidden
        for part in self.modules:
            if part.spec.name == module:
                if kind == "weight":
                    return part.outputs, part.inputs
                return (part.outputs,) if part.adds_bias else None
        return ()


def whole_modules(shapes: tuple[ModuleShape, ...]) -> tuple[ModuleShard, ...]:
    """Returns the modules of the Llama family, in these sizes, that one worker holds whole."""
    return tuple(
        ModuleShard(module, _padded(shape.in_features, 0, 1), _padded(shape.out_features, 0, 1))
        for module, shape in zip(llama_modules(), shapes, strict=True)
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
        spec=spec,
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
