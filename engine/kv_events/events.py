"""Events about the prefix cache, as vLLM (0.23 and later) sends them.

A batch is an array; each event in it is a map whose key "type" holds the name of its class.
"""

import msgspec

GPU = "GPU"


class BlockStored(msgspec.Struct, tag=True, omit_defaults=True):
    """Consecutive blocks of one request have come into the cache.

    Attributes:
        parent_block_hash: hash of the block before the first one, None at a prompt's begin.
        token_ids: of all these blocks, `block_size` each.
        lora_id: None; adapters have names here.
        lora_name: adapter or mix that applies in these blocks, None for the base model.
        extra_keys: for each block what else its hash depends on: the adapter's name, and in a
            prompt's first block salt and tenant. None where there is nothing.
    """

    block_hashes: list[bytes]
    parent_block_hash: bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[str, ...] | None] | None = None


class BlockRemoved(msgspec.Struct, tag=True, omit_defaults=True):
    """Blocks have left the cache."""

    block_hashes: list[bytes]
    medium: str | None


class AllBlocksCleared(msgspec.Struct, tag=True):
    """The cache is empty."""


KVEvent = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, array_like=True):
    """Events of one turn of the scheduler.

    Attributes:
        ts: Unix time in seconds.
        data_parallel_rank: 0; each engine has a publisher of its own.
    """

    ts: float
    events: list[KVEvent]
    data_parallel_rank: int = 0
