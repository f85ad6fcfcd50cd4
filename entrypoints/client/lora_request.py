"""Names an adapter in a request; the class and its fields are vLLM's."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """An adapter's name, and the PEFT directory that it must be.

    With a path, the request is answered by what lies there when it arrives: files that have changed
    are read again. A name that means another directory is refused, unless `load_inplace` is set:
    then the name means this directory from now on, and requests that run keep what they have.
    Without a path, the name must be registered, and the request gets what it means.

    `lora_int_id` is accepted for compatibility with vLLM and must be positive. loraplex tells
    adapters apart by name and by the hash of their content.
    """

    lora_name: str
    lora_int_id: int = 1
    lora_path: str = ""
    load_inplace: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.lora_name, str) or not self.lora_name:
            raise ValueError(f"lora_name must be a non-empty string, got {self.lora_name!r}")
        if not isinstance(self.lora_int_id, int) or self.lora_int_id < 1:
            raise ValueError(f"lora_int_id must be a positive integer, got {self.lora_int_id!r}")
        if not isinstance(self.lora_path, str):
            raise TypeError(f"lora_path must be a string, got {self.lora_path!r}")

    @property
    def name(self) -> str:
        return self.lora_name

    @property
    def adapter_id(self) -> int:
        return self.lora_int_id

    @property
    def path(self) -> str:
        return self.lora_path
