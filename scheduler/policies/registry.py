"""The policies by name."""

from loraplex.scheduler.config import SchedulerConfig
from loraplex.scheduler.policies.clustering import AdapterClustering
from loraplex.scheduler.policies.early_abort import EarlyAbort
from loraplex.scheduler.policies.fair_share import VirtualTokenCounters
from loraplex.scheduler.policies.fcfs import FirstComeFirstServed
from loraplex.scheduler.policies.policy import Policy
from loraplex.scheduler.policies.strict_priority import StrictPriority


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
