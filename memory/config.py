"""Options of the page pool."""

from dataclasses import dataclass, field

KV_CACHE_DTYPES = ("auto", "fp8")
ADAPTER_DTYPES = ("auto", "fp8")
MAX_TOKEN_ROWS = 8192  # a message of the adapter reader holds the ids of so many tokens, twice


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    """Sizes of the page pool, which KV cache and adapters share, and of the host store."""

    block_tokens: int = field(
        default=16, metadata={"help": "tokens of KV cache that one page holds"}
    )
    kv_cache_dtype: str = field(
        default="auto",
        metadata={
            "help": "type of keys and values in pages; auto: the model's; fp8: e4m3, so that the "
            "pool holds twice the tokens",
            "choices": KV_CACHE_DTYPES,
        },
    )
    adapter_dtype: str = field(
        default="auto",
        metadata={
            "help": "type of the adapters' A and B in pages; auto: the model's; fp8: e4m3, so that "
            "an adapter takes half the pages",
            "choices": ADAPTER_DTYPES,
        },
    )
    gpu_memory_utilization: float = field(
        default=0.9, metadata={"help": "share of the GPU's memory that the engine may use"}
    )
    pool_bytes: int | None = field(
        default=None,
        metadata={"help": "size of the page pool in bytes; default: the memory left after weights"},
    )
    num_pages: int | None = field(
        default=None, metadata={"help": "size of the page pool in pages; wins over pool_bytes"}
    )
    enable_prefix_caching: bool = field(
        default=True, metadata={"help": "reuse KV pages of equal prompts of one adapter and tenant"}
    )
    max_adapter_slots: int = field(
        default=1024, metadata={"help": "adapters whose weights can be in pages at one time"}
    )
    adapter_host_bytes: int = field(
        default=4 << 30,
        metadata={
            "help": "bytes of host memory for packed adapters (LRU); 0 keeps only the last one, so "
            "that every load reads its file again"
        },
    )
    max_lora_rank: int = field(
        default=256, metadata={"help": "largest rank accepted; an adapter above it is refused"}
    )

    max_token_rows: int = field(
        default=512,
        metadata={
            "help": "token rows that an adapter may replace in the embedding or add to it, and as "
            "many in the head; an adapter above it is refused"
        },
    )

    def __post_init__(self) -> None:
        if self.block_tokens < 1 or self.block_tokens & (self.block_tokens - 1):
            raise ValueError(f"block_tokens must be a power of two, got {self.block_tokens}")
        for name in ("kv_cache_dtype", "adapter_dtype"):
            choices = KV_CACHE_DTYPES if name == "kv_cache_dtype" else ADAPTER_DTYPES
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ValueError(
                f"gpu_memory_utilization must lie in (0, 1], got {self.gpu_memory_utilization}"
            )
        for name in ("pool_bytes", "num_pages"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("max_adapter_slots", "max_lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.max_token_rows <= MAX_TOKEN_ROWS:
            raise ValueError(
                f"max_token_rows must lie in [0, {MAX_TOKEN_ROWS}], got {self.max_token_rows}"
            )
        if self.adapter_host_bytes < 0:
            raise ValueError(
                f"adapter_host_bytes must not be negative, got {self.adapter_host_bytes}"
            )
