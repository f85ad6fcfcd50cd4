"""Offers what scripts of vLLM call between two engines."""

import gc


def cleanup_dist_env_and_memory(shutdown_ray: bool = False) -> None:
    """Frees engines that nothing refers to: their processes end. `shutdown_ray` is ignored."""
    gc.collect()
