"""Loads adapters from a trainer's memory through a client."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from loraplex.entrypoints.client.sync_client import Client
from loraplex.entrypoints.client.tensors.peft_model import peft_parts


class TensorLoader(ABC):
    """Base of what has a client of its own."""

    @property
    @abstractmethod
    def client(self) -> Client: ...

    def load_adapter(
        self,
        name: str,
        adapter: Any,
        tensors: Mapping[str, Any] | None = None,
        *,
        peft_name: str | None = None,
    ) -> dict[str, Any]:
        """Loads an adapter from memory. Returns it as client.list_adapters() shows it.

        A known name means the new tensors from now on; running requests finish with the old ones.

        Args:
            adapter: a PeftModel, whose weights are read now; or a configuration with `tensors`.
            tensors: see Client.load_adapter_tensors, whose errors this raises too.
            peft_name: the adapter of a PeftModel that has several; None is the active one.
        """
        if tensors is None:
            adapter, tensors = peft_parts(adapter, peft_name)
        return self.client.load_adapter_tensors(name, adapter, tensors)
