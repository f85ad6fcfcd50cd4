"""Offers the results of a request where vLLM has them."""

from loraplex.entrypoints.client.outputs import CompletionOutput as CompletionOutput
from loraplex.entrypoints.client.outputs import RequestOutput as RequestOutput
