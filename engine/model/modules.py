"""The projections of a decoder layer that adapters may change, as the model spec declares them."""

from dataclasses import dataclass
from typing import Literal

Axis = Literal["hidden", "query", "key", "inner"]


FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Names of layers that compute several modules, whose outputs lie one after another."""


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """A linear module that every layer has.

    Attributes:
        name: in a checkpoint, without its parents.
        parent: the part of the layer that holds it.
        inputs, outputs: the axes that it maps from and to. Tensor parallelism never splits
            "hidden".
        group: the number of its group. Modules of one group are neighbours, read the same input and
            run as one product.
        has_bias: whether the base model adds a bias.
    """

    name: str
    parent: str
    inputs: Axis
    outputs: Axis
    group: int
    has_bias: bool = False

    @property
    def is_row_parallel(self) -> bool:
        """Whether tensor parallelism splits its inputs, so that each rank has a partial sum."""
        return self.inputs != "hidden"

    def full_name(self, layer: int) -> str:
        """Returns its name in Hugging Face's models, which PEFT's patterns match."""
        return f"model.layers.{layer}.{self.parent}.{self.name}"


def llama_modules(
    *, qkv_bias: bool = False, output_bias: bool = False, mlp_bias: bool = False
) -> tuple[ModuleSpec, ...]:
    """Returns the modules of a layer of the Llama family. A module's place here is its id."""
    return (
        ModuleSpec("q_proj", "self_attn", "hidden", "query", 0, qkv_bias),
        ModuleSpec("k_proj", "self_attn", "hidden", "key", 0, qkv_bias),
        ModuleSpec("v_proj", "self_attn", "hidden", "key", 0, qkv_bias),
        ModuleSpec("o_proj", "self_attn", "query", "hidden", 1, output_bias),
        ModuleSpec("gate_proj", "mlp", "hidden", "inner", 2, mlp_bias),
        ModuleSpec("up_proj", "mlp", "hidden", "inner", 2, mlp_bias),
        ModuleSpec("down_proj", "mlp", "inner", "hidden", 3, mlp_bias),
    )
