"""Names an adapter in a request; the class and its fields are vLLM's."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """An adapter's name, and the PEFT directory that it must be.

    With a path, the request is answered by what lies there when it arrives: files that have changed
    are read again. A name that means another directory is refused, unless `load_inplace` is set:
    then the name means this directory from now on, and requests that run keep what they have.
    Without a path, the name must be registered, and the request gets what it means.

    `lora_int_id` is accepted for compatibility with vLLM and must be positive. loraplex tells
    adapters apart by name and by the hash of their content. `base_model_name` is accepted too, and
    read by nothing: the engine has one base model. `lora_path` may be a path object.

    With `peft_config` and `lora_tensors`, add_lora() loads the adapter from memory instead; see
    Client.load_adapter_tensors. A request then gives the name alone.
    """

    lora_name: str
    lora_int_id: int = 1
    lora_path: str = ""
    base_model_name: str | None = None
    load_inplace: bool = field(default=False, kw_only=True)
    peft_config: Any = field(default=None, kw_only=True, compare=False, repr=False)
    lora_tensors: Mapping[str, Any] | None = field(
        default=None, kw_only=True, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        if not isinstance(self.lora_name, str) or not self.lora_name:
            raise ValueError(f"lora_name must be a non-empty string, got {self.lora_name!r}")
        if not isinstance(self.lora_int_id, int) or self.lora_int_id < 1:
            raise ValueError(f"lora_int_id must be a positive integer, got {self.lora_int_id!r}")
        if isinstance(self.lora_path, os.PathLike):
            object.__setattr__(self, "lora_path", os.fspath(self.lora_path))
        if not isinstance(self.lora_path, str):
            raise TypeError(f"lora_path must be a string or a path, got {self.lora_path!r}")
        if not isinstance(self.base_model_name, str | None):
            raise TypeError(f"base_model_name must be a string, got {self.base_model_name!r}")

        if (self.peft_config is None) != (self.lora_tensors is None):
            raise ValueError("give peft_config and lora_tensors, or neither")
        if self.lora_tensors is not None and self.lora_path:
            raise ValueError("give lora_path or lora_tensors, not both")

    @property
    def name(self) -> str:
        return self.lora_name

    @property
    def adapter_id(self) -> int:
        return self.lora_int_id

    @property
    def path(self) -> str:
        return self.lora_path

    @property
    def absolute_path(self) -> str:
        """The path as the engine's processes need it, which may run in another folder."""
        return os.path.abspath(os.path.expanduser(self.lora_path)) if self.lora_path else ""
