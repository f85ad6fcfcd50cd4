"""Offers the sampling parameters where vLLM has them."""

from loraplex.engine.frontend.sampling_params import RequestOutputKind as RequestOutputKind
from loraplex.engine.frontend.sampling_params import SamplingParams as SamplingParams
