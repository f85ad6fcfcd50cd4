"""Takes tensors of fused projections, qkv_proj and gate_up_proj, apart.

Some trainers adapt one linear layer that computes several projections. All of them then have its A,
and each has its own rows of B. So these tensors are served as LoRA on the projections.
"""

from dataclasses import replace

from loraplex.engine.adapters.peft_config import PeftConfigError
from loraplex.engine.adapters.safetensors_file import TensorPlace
from loraplex.engine.adapters.target import AdapterTarget, ModuleKey
from loraplex.engine.model.modules import FUSED

_WHOLE = (".lora_A.",)  # parts of a key whose tensor every projection shares


class FusedModules:
    """The fused layers of a base model, by their full names.

    Attributes:
        keys: the projections that each of them computes, in the order of its rows.
    """

    def __init__(self, target: AdapterTarget) -> None:
        self._target = target
        ids = {module.spec.name: index for index, module in enumerate(target.modules)}
        self.keys: dict[str, tuple[ModuleKey, ...]] = {}
        for layer in range(target.num_layers):
            for fused, names in FUSED.items():
                keys = tuple((layer, ids[name]) for name in names if name in ids)
                if len(keys) == len(names):
                    full_name = target.full_name(keys[0])
                    self.keys[full_name.removesuffix(names[0]) + fused] = keys

    def split(
        self, tensors: dict[str, TensorPlace]
    ) -> tuple[dict[str, TensorPlace], dict[ModuleKey, str]]:
        """Returns the tensors with those of fused layers in parts, and the fused layer of each
        projection that has one.

        Raises:
            PeftConfigError: a tensor has another number of rows than its projections together, or
                a projection is there twice.
        """
        found: dict[str, TensorPlace] = {}
        origins: dict[ModuleKey, str] = {}
        for key, place in tensors.items():
            name = _module_of(key)
            if name not in self.keys:
                parts = {key: place}
            else:
                parts = self._parts(key, name, place)
                origins |= dict.fromkeys(self.keys[name], name)
            for part in parts.keys() & found.keys():
                raise PeftConfigError(f"tensor {part} is there twice, once of {name}")
            found |= parts
        return found, origins

    def _parts(self, key: str, name: str, place: TensorPlace) -> dict[str, TensorPlace]:
        keys, start, parts = self.keys[name], 0, {}
        num_rows = [self._target.modules[module].full_shape.out_features for _, module in keys]
        is_whole = any(part in key for part in _WHOLE) or place.shape in ((), (1,))
        if not is_whole and place.shape[0] != sum(num_rows):
            raise PeftConfigError(
                f"tensor {key} has {place.shape[0]} rows, and its projections have "
                f"{sum(num_rows)} in this base model: it was trained on another base"
            )
        for projection, count in zip(keys, num_rows, strict=True):
            own_key = key.replace(name, self._target.full_name(projection), 1)
            parts[own_key] = place if is_whole else _rows(place, start, count)
            start += count
        return parts


def _module_of(key: str) -> str:
    """Returns the full name of the module in a key that ends with one of PEFT's parts."""
    name = key.removeprefix("base_model.model.")
    for part in (".lora_", ".base_layer."):
        name = name.partition(part)[0]
    return name


def _rows(place: TensorPlace, start: int, count: int) -> TensorPlace:
    row_bytes = place.num_bytes // place.shape[0]
    return replace(
        place,
        shape=(count, *place.shape[1:]),
        start=place.start + start * row_bytes,
        num_bytes=count * row_bytes,
    )
