"""Configures the stores in which adapters are found by name."""

import math
from dataclasses import dataclass, field

TENANT = "{tenant}"
"""Part of a store's address that stands for the tenant who asks."""


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """Places where an unknown adapter is looked up on first use, and the cache of downloads."""

    adapter_stores: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "where to look up adapters that nobody has registered: a folder, hf://ORG, "
            "s3://BUCKET/PREFIX or what fsspec opens; {tenant} stands for who asks; repeatable, "
            "in the order of the look-up",
            "flag": "--adapter-store",
            "metavar": "URI",
        },
    )
    adapter_store_ttl_s: float = field(
        default=60.0,
        metadata={"help": "seconds for which a store's answer about a name holds, found or not"},
    )
    adapter_store_timeout_s: float = field(
        default=120.0, metadata={"help": "longest time to find and download an adapter"}
    )
    adapter_store_max_bytes: int = field(
        default=4 << 30, metadata={"help": "largest adapter that is downloaded"}
    )
    adapter_cache_dir: str = field(
        default="~/.cache/loraplex/adapters",
        metadata={"help": "folder for downloaded adapters; processes and engines may share it"},
    )
    adapter_cache_bytes: int = field(
        default=32 << 30,
        metadata={"help": "most bytes of downloaded adapters; the least recently used go first"},
    )

    def __post_init__(self) -> None:
        if any(not uri.strip() for uri in self.adapter_stores):
            raise ValueError("adapter_stores: an address is empty")
        for name in ("adapter_store_timeout_s", "adapter_store_max_bytes", "adapter_cache_bytes"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.adapter_store_ttl_s < math.inf:
            raise ValueError(
                f"adapter_store_ttl_s must be 0 or more, got {self.adapter_store_ttl_s}"
            )
