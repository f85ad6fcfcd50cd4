"""Offers LoRARequest where vLLM has it."""

from loraplex.entrypoints.client.lora_request import LoRARequest as LoRARequest
