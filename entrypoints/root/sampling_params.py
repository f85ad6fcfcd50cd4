"""Offers the sampling parameters where vLLM has them."""

from loraplex.engine.frontend.sampling_params import RequestOutputKind as RequestOutputKind
from loraplex.engine.frontend.sampling_params import SamplingParams as SamplingParams
from loraplex.engine.frontend.structured.structured_outputs import (
    StructuredOutputsParams as StructuredOutputsParams,
)
from loraplex.entrypoints.offline.batches.beam_search import BeamSearchParams as BeamSearchParams
