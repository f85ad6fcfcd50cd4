"""The policies by name."""

from loraplex.scheduler.config import SchedulerConfig
from loraplex.scheduler.policy import FirstComeFirstServed, Policy, StrictPriority
from loraplex.scheduler.policy_abort import EarlyAbort
from loraplex.scheduler.policy_cluster import AdapterClustering
from loraplex.scheduler.policy_vtc import VirtualTokenCounters


def make_policy(config: SchedulerConfig) -> Policy:
    """A fresh policy as `config` describes it."""
    max_wait_s = config.max_wait_s
    match config.policy:
        case "priority":
            return StrictPriority(max_wait_s=max_wait_s)
        case "cluster":
            return AdapterClustering(
                max_adapters=config.max_adapters_per_batch, max_wait_s=max_wait_s
            )
        case "abort":
            return EarlyAbort(ttft_slo_s=config.ttft_slo_s)
        case "vtc":
            return VirtualTokenCounters(
                by_adapter=config.fair_share_by == "adapter",
                weights=config.weights,
                max_wait_s=max_wait_s,
            )
    return FirstComeFirstServed(max_wait_s=max_wait_s)
