"""Computes gains and shifts in the pages of an adapter that is being loaded.

DoRA (arXiv 2402.09353) replaces W by m (W + s B A) / ||W + s B A||, with the norms over the inputs
of each output feature. So the output without its bias is multiplied by the gain
m / ||W + s B A||. The norm's square is

    ||W||^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>

with products over the r columns of B alone: no matrix as large as W is made, and ||W||^2 is kept
from the first load on. As in PEFT the base's bias is not multiplied, which takes a shift.

Where tensor parallelism splits the inputs, each rank has a part of the squares, and the ranks add
their parts up. The gain is then applied to each rank's partial output.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from loraplex.backends.fp8 import E4M3
from loraplex.engine.model.decoder import Decoder
from loraplex.engine.model.layers.lora_linear import LoRALinear
from loraplex.engine.worker.ranks import Ranks
from loraplex.memory.adapter_layout import VECTOR_ROWS, align
from loraplex.memory.device.pool import PagePool
from loraplex.memory.host.store import PackedAdapter
from loraplex.memory.vector_rows import join_vector, split_vector

MAX_ELEMS = 4 << 20
"""Elements of an adapter that are in work at one time, but for one layer. A float32 temporary has
at most as many."""

Squares = dict[tuple[int, int], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Part:
    """A module with vectors, in layers in which it has the same places."""

    module: int
    rank: int
    a_start: int
    b_start: int
    gain_at: int  # 0: none
    shift_at: int  # 0: none
    scale: float
    kept_bias: float  # how much of the base's bias stays: 0 where the adapter has its own


class AdapterVectors:
    """A PageFinisher.

    On a GPU it works on a stream of its own, which begins after the work of the current stream and
    which that stream then waits for: kernels of the current one would overtake those of steps.
    """

    def __init__(self, model: Decoder, pool: PagePool, ranks: Ranks, packing: int) -> None:
        """`packing` is AdapterTarget's."""
        self._model = model
        self._pages = pool.pages
        self._ranks = ranks
        self._packing = packing
        self._split = [
            ranks.world_size > 1 and module.spec.is_row_parallel for module in model.shard.modules
        ]
        self._shapes = model.module_shapes()
        self._largest = torch.finfo(pool.pages.dtype).max
        self._base_squares: Squares = {}
        self._stream = torch.cuda.Stream(pool.pages.device) if pool.pages.is_cuda else None

    def is_shared(self, adapter: PackedAdapter) -> bool:
        """Returns whether a module with a gain is split by input."""
        return bool(adapter.gain_start[:, self._split].any())

    def agree(self, is_ready: bool) -> bool:
        num_missing = self._ranks.sum_of_loaders(torch.tensor([float(not is_ready)]))
        return not num_missing.item()

    @torch.inference_mode()
    def finish(self, adapter: PackedAdapter, page_ids: torch.Tensor) -> None:
        if not adapter.has_vectors:
            return
        if self._stream is None:
            self._finish(adapter, page_ids)
            return
        current = torch.cuda.current_stream(self._pages.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._finish(adapter, page_ids)
        current.wait_stream(self._stream)

    def _finish(self, adapter: PackedAdapter, page_ids: torch.Tensor) -> None:
        runs = list(_runs(adapter, MAX_ELEMS // (adapter.num_pages * self._pages.shape[2])))
        squares: Squares = {}
        for index, (layers, parts) in enumerate(runs):
            weights = self._gather(layers, page_ids)
            for part in parts:
                if part.gain_at:
                    squares[index, part.module] = self._squares(part, layers, weights)
        self._add_ranks(squares)
        for index, (layers, parts) in enumerate(runs):
            weights = self._gather(layers, page_ids)
            for part in parts:
                self._write(part, layers, weights, squares.get((index, part.module)))
            pages = weights.view(len(layers), len(page_ids), -1)
            self._pages[layers.start : layers.stop].index_copy_(1, page_ids, pages)

    def _gather(self, layers: range, page_ids: torch.Tensor) -> torch.Tensor:
        """Returns a copy of the layers' virtual arrays, [layers, elements]."""
        pages = self._pages[layers.start : layers.stop].index_select(1, page_ids)
        return pages.view(len(layers), -1)

    def _add_ranks(self, squares: Squares) -> None:
        """Replace the squares of split modules by their sums over all ranks."""
        split = [key for key in squares if self._split[key[1]]]
        if not split:
            return
        sums = self._ranks.sum_of_loaders(torch.cat([squares[key].flatten() for key in split]))
        sizes = [squares[key].numel() for key in split]
        for key, part in zip(split, sums.split(sizes), strict=True):
            squares[key] = part.view_as(squares[key])

    def _squares(self, part: _Part, layers: range, weights: torch.Tensor) -> torch.Tensor:
        """Returns this rank's part of ||W + s B A||^2, float32 [layers, out_features]."""
        shape = self._shapes[part.module]
        own = weights.view(E4M3) if self._packing > 1 else weights
        a = _rows(own, part.a_start, part.rank, shape.in_features, self._packing)
        b = _rows(own, part.b_start, part.rank, shape.out_features, self._packing).float()
        a = a.to(weights.dtype)
        bases = (self._linear(layer, part.module).weight_of(part.module) for layer in layers)
        cross = torch.stack([_product(own, base) for own, base in zip(a, bases, strict=True)])
        a = a.float()
        quadratic = a.bmm(a.mT).bmm(b)
        sums = ((2 * part.scale) * cross + part.scale**2 * quadratic).mul_(b).sum(dim=1)
        return sums + torch.stack([self._square(layer, part.module) for layer in layers])

    def _square(self, layer: int, module: int) -> torch.Tensor:
        """Returns this rank's part of ||W||^2, float32 [out_features]."""
        square = self._base_squares.get((layer, module))
        if square is None:
            base = self._linear(layer, module).weight_of(module)
            square = torch.linalg.vector_norm(base, dim=1, dtype=torch.float32).square_()
            self._base_squares[layer, module] = square
        return square

    def _write(
        self, part: _Part, layers: range, weights: torch.Tensor, squares: torch.Tensor | None
    ) -> None:
        """Overwrite a module's vectors in the virtual arrays; `squares` are for its gain."""
        width = self._shapes[part.module].out_features
        gain: torch.Tensor | float = 1.0
        if squares is not None:
            magnitude = _rows(weights, part.gain_at, VECTOR_ROWS, width)
            norms = squares.clamp_min(0).sqrt()
            # Where the norm is 0 so is the output. KV cache must find finite numbers in the page.
            gain = torch.where(norms > 0, join_vector(magnitude) / norms, 0)
            gain = gain.clamp(-self._largest, self._largest)
            magnitude.copy_(split_vector(gain, weights.dtype))
        biases = [self._linear(layer, part.module).bias_of(part.module) for layer in layers]
        of_base = [bias for bias in biases if bias is not None]
        if part.shift_at and of_base:
            rows = _rows(weights, part.shift_at, VECTOR_ROWS, width)
            shift = join_vector(rows) + (part.kept_bias - gain) * torch.stack(of_base).float()
            rows.copy_(split_vector(shift, weights.dtype))

    def _linear(self, layer: int, module: int) -> LoRALinear:
        return self._model.layers[layer].linear_of(module)


def _runs(adapter: PackedAdapter, max_layers: int) -> Iterator[tuple[range, list[_Part]]]:
    """Yields ranges of layers whose modules lie at the same places, and these modules."""
    tables = (
        adapter.rank, adapter.a_start, adapter.b_start, adapter.gain_start, adapter.shift_start,
        adapter.scale,
    )  # fmt: skip
    rows = torch.stack([table.double() for table in tables], dim=-1).tolist()
    start = 0
    for layer in range(1, len(rows) + 1):
        if layer < len(rows) and rows[layer] == rows[start] and layer - start < max_layers:
            continue
        kept_bias = 0.0 if adapter.replaces_bias else 1.0
        parts = [
            _Part(module, int(rank), int(a), int(b), int(gain), int(shift), scale, kept_bias)
            for module, (rank, a, b, gain, shift, scale) in enumerate(rows[start])
            if gain or shift
        ]
        if parts:
            yield range(start, layer), parts
        start = layer


def _rows(
    weights: torch.Tensor, start: int, count: int, width: int, packing: int = 1
) -> torch.Tensor:
    """Returns rows of virtual arrays [layers, numbers], a view [layers, count, width].

    Args:
        packing: numbers in an element.
    """
    stride = align(-(-width // packing)) * packing
    rows = weights[:, start : start + count * stride]
    return rows.unflatten(1, (count, stride))[..., :width]


def _product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Returns x y^T in float32, without a float32 copy of y on a GPU."""
    if x.is_cuda and x.dtype is not torch.float32:
        return torch.mm(x, y.t(), out_dtype=torch.float32)
    return x.float().mm(y.float().t())
