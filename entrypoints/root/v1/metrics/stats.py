"""Offers the times of a request where vLLM has them."""

from loraplex.entrypoints.client.outputs import RequestStateStats as RequestStateStats
