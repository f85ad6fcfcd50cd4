"""Offers AsyncLLM where vLLM has it."""

from loraplex.entrypoints.offline.async_llm import AsyncLLM as AsyncLLM
