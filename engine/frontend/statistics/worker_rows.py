"""Describes the workers for health."""

from typing import Any

from loraplex.engine.ipc.messages.frontend import EngineInfo


def worker_rows(info: EngineInfo) -> list[dict[str, Any]]:
    """Returns the devices, backends and bytes of each worker rank."""
    return [
        {
            "rank": worker.rank,
            "device": worker.device,
            "lora_backend": worker.lora_backend,
            "attention_backend": worker.attention_backend,
            "linear_backend": worker.linear_backend,
            "weight_bytes": worker.weight_bytes,
            "pool_bytes": worker.num_pages * worker.page_bytes * worker.num_layers,
            "adapter_rank": worker.adapter_rank,
            "adapter_bytes": worker.adapter_bytes,
        }
        for worker in info.workers
    ]
