"""All series, in the order of the text."""

from loraplex.entrypoints.metrics.own_series import OWN_SERIES
from loraplex.entrypoints.metrics.store_series import STORE_SERIES
from loraplex.entrypoints.metrics.vllm_series import VLLM_SERIES

SERIES = VLLM_SERIES + OWN_SERIES + STORE_SERIES
