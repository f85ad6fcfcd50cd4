"""Offers the results of a beam search where vLLM has them."""

from loraplex.entrypoints.offline.batches.beam_search import BeamSearchOutput as BeamSearchOutput
from loraplex.entrypoints.offline.batches.beam_search import (
    BeamSearchSequence as BeamSearchSequence,
)
