"""The decoder of the Llama family. A ModelSpec says which parts a checkpoint has."""

from collections.abc import Callable

import torch

from loraplex.backends.collective.contract import ATTENTION, CollectiveOp
from loraplex.backends.collective.contract import MLP as MLP_ROLE
from loraplex.backends.linear.contract import PLAIN, LinearOp, LinearSpec
from loraplex.backends.linear.torch_linear import TorchLinear
from loraplex.backends.lora.contract import LoRAGroup
from loraplex.engine.model.forward_context import Activations, ForwardContext
from loraplex.engine.model.layers.attention import Attention
from loraplex.engine.model.layers.embedding import Embedding
from loraplex.engine.model.layers.lora_linear import LoRALinear, make_group
from loraplex.engine.model.layers.mlp import MLP
from loraplex.engine.model.layers.norm import RMSNorm
from loraplex.engine.model.layers.rope import RotaryEmbedding
from loraplex.engine.model.shard import ModuleShard, Shard, whole
from loraplex.engine.model.spec import ModelSpec
from loraplex.engine.model.vocabulary_change import VocabularyChange
from loraplex.engine.model.weight_slot import TensorSlot, WeightSlot
from loraplex.memory.adapter_layout import ModuleShape


def projection_groups(modules: tuple[ModuleShard, ...]) -> tuple[LoRAGroup, ...]:
    """Returns the groups of every layer, q|k|v, o, gate|up and down in the Llama family."""
    numbers = dict.fromkeys(module.spec.group for module in modules)
    return tuple(make_group(modules, number) for number in numbers)


class DecoderLayer:
    """Attention and feed-forward, each after a norm and added to the residual stream.

    Runs as `start`, then `attend`, then `finish`; see Attention.
    """

    def __init__(
        self, attention_norm: RMSNorm, attention: Attention, mlp_norm: RMSNorm, mlp: MLP
    ) -> None:
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def linear_of(self, module: int) -> LoRALinear:
        """Returns the linears that hold a module, by its id."""
        linears = (self.attention.qkv, self.attention.output, self.mlp.gate_up, self.mlp.down)
        return next(linear for linear in linears if module in linear.group.modules)

    def start(
        self, delta: torch.Tensor | None, activations: Activations, ctx: ForwardContext
    ) -> None:
        """Run up to the attention op.

        Args:
            delta: the result of the previous layer's `finish`; None for the first layer.
        """
        if delta is None:
            x = self.attention_norm(activations.residual, ctx)
        else:
            x = self.attention_norm.add(delta, activations.residual, ctx)
        self.attention.project(x, activations, ctx)

    def attend(self, activations: Activations, ctx: ForwardContext) -> None:
        self.attention.attend(activations, ctx)

    def finish(self, activations: Activations, ctx: ForwardContext) -> torch.Tensor:
        """Run from the attention op on. Returns [T, hidden_size], which the next norm adds to the
        residual."""
        x = self.attention.finish(activations, ctx)
        return self.mlp(self.mlp_norm.add(x, activations.residual, ctx), ctx)


class Decoder:
    """Computes hidden states of a flat list of tokens, without padding or a host sync.

    Its weights are uninitialised: fill them with `engine.checkpoint.weights.load_weights`. Run it
    under `torch.inference_mode()`.

    Attributes:
        shard: the part of the model that it holds.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        shard: Shard | None = None,
        linear: LinearOp | None = None,
        collective: CollectiveOp | None = None,
        on_layer: Callable[[], None] = lambda: None,
    ) -> None:
        """Makes the layers.

        Args:
            linear: owns the projections' weights; None: they are in `dtype`.
            collective: joins the ranks of a split model; None where `shard` is all of it.
            on_layer: called before each layer of `forward`, as a sign that a long step goes on.
        """
        self.spec = spec
        self.shard = shard or whole(spec)
        self._collective = collective
        self._on_layer = on_layer
        self.dtype = dtype
        self.device = torch.device(device)
        self._linear = linear or TorchLinear(LinearSpec(dtype, self.device, PLAIN))
        self.embedding = self._make_embedding()
        self.head = self.embedding if spec.tie_embeddings else self._make_embedding()
        self.rope = RotaryEmbedding(spec, self.device)
        self.groups = projection_groups(self.shard.modules)
        self.layers = [self._make_layer(index, self.groups) for index in range(spec.num_layers)]
        self.norm = self._make_residual_norm()

    @property
    def holds_fp8(self) -> bool:
        """Whether the projections' weights are rounded to fp8."""
        return self._linear.takes_fp8

    def module_shapes(self) -> tuple[ModuleShape, ...]:
        """Returns the sizes of this worker's projections, in the order of their ids."""
        return self.shard.shapes

    def forward(self, token_ids: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """Run T tokens of any number of sequences, and write their K and V to the pool.

        Args:
            token_ids: int32 or int64 [T], in the order of ctx.positions and ctx.kv_rows.

        Returns:
            [T, hidden_size], after the last norm.
        """
        activations = self.make_activations(len(token_ids))
        self.start(token_ids, activations, ctx)
        *layers, last = self.layers
        for index, layer in enumerate(layers):
            self._on_layer()
            layer.attend(activations, ctx)
            self.resume(index, activations, ctx)
        self._on_layer()
        last.attend(activations, ctx)
        return self.finish(activations, ctx)

    def make_activations(self, num_tokens: int) -> Activations:
        """Returns uninitialised activations for `start`."""
        head_dim = self.spec.head_dim
        heads = (num_tokens, self.shard.num_heads, head_dim)
        return Activations(
            residual=self._empty(num_tokens, self.spec.hidden_size, dtype=self.dtype),
            cos_sin=self._empty(num_tokens, head_dim, dtype=torch.float32),
            q=self._empty(*heads, dtype=self.dtype),
            attended=self._empty(*heads, dtype=self.dtype),
        )

    def start(self, token_ids: torch.Tensor, activations: Activations, ctx: ForwardContext) -> None:
        """Run up to the first layer's attention op.

        Args:
            token_ids: int32 or int64 [T].
            activations: of T tokens.
        """
        self.embedding(token_ids, out=activations.residual, change=ctx.vocabulary)
        self.rope.cos_sin(ctx.positions, out=activations.cos_sin)
        self.layers[0].start(None, activations, ctx)

    def resume(self, index: int, activations: Activations, ctx: ForwardContext) -> None:
        """Run from layer `index`'s attention op up to the next layer's."""
        delta = self.layers[index].finish(activations, ctx)
        self.layers[index + 1].start(delta, activations, ctx)

    def finish(self, activations: Activations, ctx: ForwardContext) -> torch.Tensor:
        """Run from the last layer's attention op on. Returns [T, hidden_size], normed."""
        delta = self.layers[-1].finish(activations, ctx)
        return self.norm.add(delta, activations.residual, ctx).x

    def logits(
        self,
        hidden: torch.Tensor,
        out: torch.Tensor | None = None,
        change: VocabularyChange | None = None,
    ) -> torch.Tensor:
        """Returns logits [N, vocab_size] of hidden states [N, hidden_size], in the model's dtype.

        They are written to `out`, if it is given. `change` is made by adapters of these N rows; it
        may add columns.
        """
        return self.head.logits(hidden, out, change)

    def parameters(self) -> dict[str, torch.Tensor]:
        """Returns every tensor of a checkpoint by its Hugging Face name, as the model computes with
        it: a view, or a copy of a weight that is held in fewer bits."""
        return {name: slot.values() for name, slot in self.slots().items()}

    def slots(self) -> dict[str, WeightSlot]:
        """Returns the place of every tensor of a checkpoint, by its Hugging Face name."""
        named: dict[str, WeightSlot] = {
            "model.embed_tokens.weight": TensorSlot(self.embedding.weight)
        }
        for index, layer in enumerate(self.layers):
            prefix = f"model.layers.{index}"
            attention, mlp = layer.attention, layer.mlp
            named[f"{prefix}.input_layernorm.weight"] = TensorSlot(layer.attention_norm.weight)
            named[f"{prefix}.post_attention_layernorm.weight"] = TensorSlot(layer.mlp_norm.weight)
            for linear in (attention.qkv, attention.output):
                named.update(linear.slots(f"{prefix}.self_attn"))
            for linear in (mlp.gate_up, mlp.down):
                named.update(linear.slots(f"{prefix}.mlp"))
            if attention.q_norm is not None and attention.k_norm is not None:
                named[f"{prefix}.self_attn.q_norm.weight"] = TensorSlot(attention.q_norm.weight)
                named[f"{prefix}.self_attn.k_norm.weight"] = TensorSlot(attention.k_norm.weight)
        named["model.norm.weight"] = TensorSlot(self.norm.weight)
        if self.head is not self.embedding:
            named["lm_head.weight"] = TensorSlot(self.head.weight)
        return named

    def _make_layer(self, index: int, groups: tuple[LoRAGroup, ...]) -> DecoderLayer:
        spec, modules = self.spec, self.spec.modules
        roles = (None, ATTENTION, None, MLP_ROLE)  # of the row-parallel ones
        qkv, output, gate_up, down = (
            LoRALinear(
                group,
                index,
                tuple(modules[module] for module in group.modules),
                linear=self._linear,
                dtype=self.dtype,
                device=self.device,
                collective=None if role is None else self._collective,
                role=role or 0,
            )
            for group, role in zip(groups, roles, strict=True)
        )
        attention = Attention(
            qkv,
            output,
            q_norm=self._make_norm(spec.head_dim) if spec.qk_norm else None,
            k_norm=self._make_norm(spec.head_dim) if spec.qk_norm else None,
        )
        return DecoderLayer(
            attention_norm=self._make_residual_norm(),
            attention=attention,
            mlp_norm=self._make_residual_norm(),
            mlp=MLP(gate_up, down, self._linear.takes_fp8),
        )

    def _empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _make_embedding(self) -> Embedding:
        return Embedding(
            self.shard.vocabulary,
            self.spec.hidden_size,
            dtype=self.dtype,
            device=self.device,
            collective=self._collective,
        )

    def _make_residual_norm(self) -> RMSNorm:
        spec = self.spec
        return RMSNorm(
            spec.hidden_size,
            spec.rms_norm_eps,
            dtype=self.dtype,
            device=self.device,
            collective=self._collective,
            writes_fp8=self._linear.takes_fp8,
        )

    def _make_norm(self, size: int) -> RMSNorm:
        return RMSNorm(size, self.spec.rms_norm_eps, dtype=self.dtype, device=self.device)
