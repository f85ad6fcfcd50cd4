"""Maps vLLM's integer ids of adapters to names."""

from loraplex.entrypoints.client.lora_request import LoRARequest


class LoRAIds:
    """Holds the adapters that add_lora() has loaded, by `lora_int_id`."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}

    @property
    def ids(self) -> set[int]:
        return set(self._names)

    def has(self, request: LoRARequest) -> bool:
        """Tells whether the adapter is loaded.

        Raises:
            ValueError: the request has neither path nor tensors, or its id is another adapter's.
        """
        if not request.lora_path and request.lora_tensors is None:
            raise ValueError(
                f"adapter {request.lora_name!r}: give its folder as lora_path, or peft_config and "
                "lora_tensors"
            )
        name = self._names.get(request.lora_int_id)
        if name not in (None, request.lora_name):
            raise ValueError(
                f"lora_int_id {request.lora_int_id} is adapter {name!r}, not "
                f"{request.lora_name!r}: give each adapter an id of its own"
            )
        return name is not None

    def add(self, request: LoRARequest) -> None:
        self._names[request.lora_int_id] = request.lora_name

    def remove(self, lora_id: int) -> None:
        self._names.pop(lora_id, None)

    def name_of(self, lora_id: int) -> str:
        """Returns the adapter's name.

        Raises:
            ValueError: add_lora() has not loaded an adapter with this id.
        """
        if lora_id not in self._names:
            raise ValueError(f"no adapter has lora_int_id {lora_id}: load it with add_lora()")
        return self._names[lora_id]
