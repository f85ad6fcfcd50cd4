"""Offers the kinds of metrics where vLLM has them."""

from loraplex.entrypoints.offline.metrics import Counter as Counter
from loraplex.entrypoints.offline.metrics import Gauge as Gauge
from loraplex.entrypoints.offline.metrics import Histogram as Histogram
from loraplex.entrypoints.offline.metrics import Metric as Metric
from loraplex.entrypoints.offline.metrics import Vector as Vector
