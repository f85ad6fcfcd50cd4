"""Offers the kinds of prompts where vLLM has them."""

from loraplex.entrypoints.offline.prompts import TextPrompt as TextPrompt
from loraplex.entrypoints.offline.prompts import TokensPrompt as TokensPrompt
