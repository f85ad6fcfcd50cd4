"""Backend ``triton`` of op ``lora``: SGMV (Punica, arXiv 2310.18547) over the page pool.

Each group of projections takes two launches. Shrink splits K where few tiles would leave the GPU
idle. Expand sums the splits in order and adds to y. On Hopper the two overlap through programmatic
dependent launch: expand fetches its weights while shrink still runs.

A plan writes all that depends on the batch (counts, tiles, splits) to one array on the device,
where kernels.py reads it.
"""

import numpy as np
import torch
from triton import knobs

from loraplex.backends.fp8 import E4M3, why_not_e4m3
from loraplex.backends.launch.buffers import BufferPool
from loraplex.backends.launch.upload import Uploader
from loraplex.backends.lora.contract import (
    Int32Array,
    LoRABatch,
    LoRAGroup,
    LoRASpec,
    LoRATable,
    check_graph_batch,
)
from loraplex.backends.lora.sgmv.blocks import (
    RANK_CLASSES,
    Regime,
    Tuned,
    expand_blocks,
    rank_class,
    shrink_blocks,
    tuned_for,
)
from loraplex.backends.lora.sgmv.launch import (
    HEADER_INTS,
    KIND,
    GroupBlocks,
    SGMVLaunches,
    SGMVPlan,
)
from loraplex.backends.lora.sgmv.work_lists import WorkLists

MAX_SPLITS: dict[Regime, int] = {"decode": 16, "prefill": 8}
MIN_SPLIT_CHUNKS = 4
MAX_V_ELEMS = 1 << 24
"""Bounds the scratch memory for splits of K, but for one split of the largest step."""
_DECODE: tuple[Regime, int] = ("decode", RANK_CLASSES[0])
PREFILL_ROWS = 48
"""From this many rows an adapter on, on average, the prefill kernels' larger tiles pay."""
PREFILL_ROWS_LARGE_RANKS = 9
"""The same where a rank is above 16: the decode kernels take 16 ranks at a time."""


class TritonSGMV:
    """Attributes:
    scratch: float32, x A between shrink and expand.
    """

    name = "triton"
    graph_kinds: tuple[str, ...] = (KIND,)
    max_graph_rows = 1024
    """Steps of more rows may run the prefill kernels and a grid that depends on the plan."""

    @staticmethod
    def probe(spec: LoRASpec | None = None) -> str | None:
        """Returns None when usable, else the reason."""
        interpreted = knobs.runtime.interpret
        if not interpreted and not torch.cuda.is_available():
            return "it needs a CUDA device"
        if spec is None:
            return None
        if interpreted:
            is_bf16 = spec.dtype is torch.bfloat16
            return "Triton's interpreter gets bfloat16 wrong" if is_bf16 else None
        if spec.device.type != "cuda":
            return f"it needs a CUDA device, not {spec.device.type}"
        return why_not_e4m3(spec.device) if spec.weight_dtype is E4M3 else None

    def __init__(self, spec: LoRASpec, tuned: Tuned | None = None) -> None:
        self._spec = spec
        capability, self._num_processors = describe_device(spec.device)
        if tuned is None:  # the table is measured with 16-bit weights
            tuned = tuned_for(None if spec.dtype == torch.float32 else capability)
        self._tuned = tuned
        self._uploader = Uploader(spec.device)
        self._order_at = HEADER_INTS * len(spec.groups)
        self._blocks = {
            regime: [self._group_blocks(i, regime) for i in range(len(spec.groups))]
            for regime in (_DECODE, *_prefill_classes(spec.max_rank))
        }
        max_rank, rows = _round_up(spec.max_rank), max(spec.max_num_tokens, 1)
        self._buffers = BufferPool(spec.device, 4 * self._max_meta_ints(rows))
        graph_ints = self._max_meta_ints(min(rows, self.max_graph_rows))
        self._static = torch.zeros(graph_ints, dtype=torch.int32, device=spec.device)
        num_modules = max(len(group.modules) for group in spec.groups)
        wanted = min(max(4 * rows, 16 * self.max_graph_rows) * max_rank * num_modules, MAX_V_ELEMS)
        self.scratch = torch.empty(
            max(wanted, rows * max_rank * num_modules), dtype=torch.float32, device=spec.device
        )
        self._launches = SGMVLaunches(
            spec, v=self.scratch, order_at=self._order_at,
            pdl=capability is not None and capability[0] >= 9,
        )  # fmt: skip
        self._graph_blocks = {b.group.modules[0]: b for b in self._blocks[_DECODE]}

    def kind_of(self, *, table: LoRATable, batch: LoRABatch) -> str:
        return KIND

    def plan(self, *, table: LoRATable, batch: LoRABatch) -> SGMVPlan:
        regime, headers, meta = self._prepare(table, batch)
        buffer = self._buffers.take()
        self._uploader.upload({"meta": meta}, out=buffer.tensor)
        launches = self._eager_launches(regime, headers)
        return SGMVPlan(table, buffer.tensor.view(torch.int32), launches, buffer)

    def plan_graph(self, *, table: LoRATable, batch: LoRABatch, kind: str) -> SGMVPlan:
        check_graph_batch(self, batch, kind)
        _, _, meta = self._prepare(table, batch)
        self._uploader.upload({"meta": meta}, out=self._static.view(torch.uint8))
        return SGMVPlan(table, self._static, {}, None)

    def shrink(
        self, plan: SGMVPlan, *, x: torch.Tensor, pool: torch.Tensor, layer: int, group: LoRAGroup
    ) -> None:
        num_rows = x.shape[0]
        if num_rows <= self.max_graph_rows:
            blocks = self._graph_blocks[group.modules[0]]
            num_programs = min(num_rows * blocks.row_items, blocks.shrink_programs)
        else:
            blocks, num_programs, _ = plan.launches[group.modules[0]]
        self._launches.shrink(num_programs, blocks, plan, x=x, pool=pool, layer=layer)

    def expand(
        self, plan: SGMVPlan, *, y: torch.Tensor, pool: torch.Tensor, layer: int, group: LoRAGroup
    ) -> None:
        num_rows = y.shape[0]
        if num_rows <= self.max_graph_rows:
            blocks = self._graph_blocks[group.modules[0]]
            num_programs = min(num_rows * blocks.num_blocks, blocks.expand_programs)
        else:
            blocks, _, num_programs = plan.launches[group.modules[0]]
        self._launches.expand(num_programs, blocks, plan, y=y, pool=pool, layer=layer)

    def _prepare(
        self, table: LoRATable, batch: LoRABatch
    ) -> tuple[tuple[Regime, int], Int32Array, Int32Array]:
        """Returns the regime, the headers [groups, HEADER_INTS] and all of a plan's metadata."""
        headers = np.zeros((len(self._spec.groups), HEADER_INTS), dtype=np.int32)
        headers[:, 6] = 1  # the panel is a divisor
        regime, lists = _DECODE, list[Int32Array]()
        if not batch.is_empty:
            # int32 [modules, segments]: the largest rank in any layer
            ranks = table.host_rank.numpy()[:, :, batch.segment_slots].max(axis=0)
            regime = self._choose_regime(batch, int(ranks.max()))
            lists = self._plan_groups(regime, headers, batch, ranks)
        meta = np.concatenate([headers.ravel(), batch.token_order, *lists])
        return regime, headers, meta.astype(np.int32, copy=False)

    def _eager_launches(
        self, regime: tuple[Regime, int], headers: Int32Array
    ) -> dict[int, tuple[GroupBlocks, int, int]]:
        launches: dict[int, tuple[GroupBlocks, int, int]] = {}
        for blocks, header in zip(self._blocks[regime], headers.tolist(), strict=True):
            num_items, _, num_tiles, _, num_splits, _, panel_blocks = header[:7]
            panels = _num_panels(blocks.group, blocks.expand.columns, panel_blocks)
            launches[blocks.group.modules[0]] = blocks, num_items * num_splits, num_tiles * panels
        return launches

    def _choose_regime(self, batch: LoRABatch, largest_rank: int) -> tuple[Regime, int]:
        """Returns "decode" for few rows, or for more rows of mostly different adapters."""
        num_rows, num_segments = len(batch.token_order), len(batch.segment_slots)
        is_large = largest_rank > RANK_CLASSES[0]
        rows_wanted = (PREFILL_ROWS_LARGE_RANKS if is_large else PREFILL_ROWS) * num_segments
        is_prefill = batch.num_tokens > self.max_graph_rows and num_rows >= rows_wanted
        regime: Regime = "prefill" if is_prefill else "decode"
        return regime, rank_class(regime, largest_rank)

    def _plan_groups(
        self,
        regime: tuple[Regime, int],
        headers: Int32Array,
        batch: LoRABatch,
        ranks: Int32Array,
    ) -> list[Int32Array]:
        """Fill the headers. Returns the lists that follow the order of tokens.

        Args:
            ranks: int32 [modules, segments].
        """
        num_rows = len(batch.token_order)
        lists = WorkLists(batch, self._order_at + num_rows)
        for index, group in enumerate(self._spec.groups):
            blocks = self._blocks[regime][index]
            of_group = ranks[group.modules[0] : group.modules[-1] + 1]
            largest = int(of_group.max())
            if not largest:
                continue
            num_items, items_at = lists.items(
                blocks.shrink.rows, blocks.item_ranks, of_group.sum(axis=0, dtype=np.int32)
            )
            num_tiles, tiles_at = lists.tiles(blocks.expand.rows)
            room = self.scratch.numel() // (num_rows * len(group.modules) * _round_up(largest))
            splits, chunks = self._split_k(group, num_items, room, blocks)
            headers[index, :9] = (
                num_items, items_at, num_tiles, tiles_at, splits, chunks,
                self._panel_blocks(group, num_tiles, blocks), _round_up(largest), num_rows,
            )  # fmt: skip
        return lists.arrays

    def _split_k(
        self, group: LoRAGroup, num_items: int, room: int, blocks: GroupBlocks
    ) -> tuple[int, int]:
        """Returns the number of splits, none empty, and the chunks of 64 features in each."""
        chunks = -(-group.in_features // 64)
        wanted = blocks.shrink.waves * self._num_processors // num_items
        most = min(wanted, room, blocks.max_splits, chunks // MIN_SPLIT_CHUNKS)
        per_split = -(-chunks // max(1, most))
        return -(-chunks // per_split), per_split

    def _panel_blocks(self, group: LoRAGroup, num_tiles: int, blocks: GroupBlocks) -> int:
        """Returns the blocks of columns of a unit with which the units fill the programs once."""
        wanted = blocks.expand.waves * self._num_processors
        panel = min(-(-num_tiles * blocks.num_blocks // wanted), blocks.expand.max_panel)
        columns = blocks.expand.columns
        while (
            panel < blocks.expand.max_panel
            and num_tiles * _num_panels(group, columns, panel) > wanted
        ):
            panel += 1
        return panel

    def _group_blocks(self, index: int, regime: tuple[Regime, int]) -> GroupBlocks:
        group, (phase, ranks) = self._spec.groups[index], regime
        max_rank = self._spec.max_rank
        shrink = shrink_blocks(self._tuned, phase, ranks, group.in_features)
        expand = expand_blocks(self._tuned, phase, ranks, sum(group.out_features))
        together = 1 << (ranks * len(group.modules) - 1).bit_length()
        item_ranks = min(shrink.max_ranks, together)
        return GroupBlocks(
            regime=regime,
            group=group,
            index=index,
            shrink=shrink,
            expand=expand,
            item_ranks=item_ranks,
            max_rank=_round_up(max_rank) if phase == "decode" else ranks,
            max_splits=MAX_SPLITS[phase],
            num_blocks=_num_panels(group, expand.columns, 1),
            row_items=-(-len(group.modules) * max_rank // item_ranks) * MAX_SPLITS[phase],
            shrink_programs=shrink.waves * self._num_processors,
            expand_programs=expand.waves * self._num_processors,
        )

    def _max_meta_ints(self, rows: int) -> int:
        """Returns the ints of the largest plan of `rows` rows: no two share an adapter."""
        max_rank, most = self._spec.max_rank, 0
        for (regime, _), of_groups in self._blocks.items():
            segments = rows if regime == "decode" else rows // 8 + 1
            ints = 0
            for group, blocks in zip(self._spec.groups, of_groups, strict=True):
                num_items = -(-len(group.modules) * max_rank // blocks.item_ranks)
                item_tiles = min(rows, segments + rows // blocks.shrink.rows)
                tiles = min(rows, segments + rows // blocks.expand.rows)
                ints += 4 * (item_tiles * num_items + tiles)
            most = max(most, ints)
        return -(-(self._order_at + rows + most) // 4) * 4


def _num_panels(group: LoRAGroup, columns: int, panel_blocks: int) -> int:
    return sum(-(-out // (columns * panel_blocks)) for out in group.out_features)


def _prefill_classes(max_rank: int) -> list[tuple[Regime, int]]:
    largest = rank_class("prefill", max_rank)
    return [("prefill", ranks) for ranks in RANK_CLASSES if ranks <= largest]


def _round_up(rank: int) -> int:
    return -(-rank // 16) * 16


def describe_device(device: torch.device) -> tuple[tuple[int, int] | None, int]:
    """Returns the compute capability and the number of multiprocessors."""
    if device.type != "cuda":
        return None, 2
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count
