"""PEFT directories: adapters that real PEFT saves compute what PEFT computes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from loraplex.backends.lora.contract import LoRAGroup, LoRASpec, apply_lora
from loraplex.backends.lora.torch_bmm import TorchLoRA
from loraplex.engine.adapters.peft_files import read_adapter
from loraplex.engine.adapters.table import AdapterTable, group_rows
from loraplex.engine.model.modules import llama_modules
from loraplex.memory.adapter_layout import ROW_ALIGN
from loraplex.memory.device.pool import PagePool, PageShape

from helpers.models.peft_adapters import make_adapter
from helpers.models.peft_folders import (
    BLOCK_TOKENS,
    PAGE_ELEMS,
    SHAPES,
    edit_config,
    make_target,
)

CASES: dict[str, dict[str, Any]] = {
    "one": {"r": 1, "alpha": 3, "targets": ["q_proj"]},
    "qkvo": {"r": 8, "alpha": 16, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "all-linear": {"r": 4, "alpha": 8, "targets": "all-linear"},
    "rslora": {"r": 16, "alpha": 8, "targets": ["v_proj", "down_proj"], "use_rslora": True},
    "regex": {"r": 5, "alpha": 7, "targets": r".*\.(0|2)\.mlp\.(gate|up)_proj"},
    "patterns": {
        "r": 9,
        "alpha": 10,
        "targets": ["q_proj", "up_proj", "o_proj"],
        "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 17, "up": 33},
        "alpha_pattern": {"up_proj": 40, "model.layers.0.self_attn.o_proj": 2.5},
        "use_rslora": True,
    },
    "layers": {
        "r": 2, "alpha": 4, "targets": ["k_proj", "gate_proj"], "layers_to_transform": [0, 2],
    },
    "layers-pattern": {
        "r": 2, "alpha": 4, "targets": ["k_proj"], "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    "excluded": {
        "r": 2, "alpha": 4, "targets": ["q_proj", "v_proj"],
        "exclude_modules": r".*layers\.0\..*",
    },
    "full-names": {"r": 3, "alpha": 4, "targets": ["model.layers.1.mlp.down_proj", "k_proj"]},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_linear_equals_peft(case: str, hf_model: PreTrainedModel, tmp_path: Path) -> None:
    """Packed, put on shuffled pages and run by the torch backend, module by module."""
    folder = make_adapter(hf_model, tmp_path / "adapter", **CASES[case])
    target = make_target()
    packed = read_adapter(case, folder, target)
    shape = PageShape(3, BLOCK_TOKENS, 2, 16, torch.float32)
    pool = PagePool(shape, 2 * packed.num_pages + 3, torch.device("cpu"))
    pages = torch.randperm(pool.num_pages - 1)[: packed.num_pages] + 1
    pool.write_pages(pages, packed.data)
    table = AdapterTable(target, num_slots=4, device=torch.device("cpu"))
    table.write_device(2, packed, pages)
    table.write_host(2, packed, pages)
    groups = {
        module: LoRAGroup((module,), sizes.in_features, (0,), (sizes.out_features,), ROW_ALIGN)
        for module, sizes in enumerate(SHAPES)
    }
    spec = LoRASpec(64, 64, torch.float32, torch.device("cpu"), PAGE_ELEMS, tuple(groups.values()))
    op = TorchLoRA(spec)
    batch = group_rows(np.array([2], np.int32), np.array([5], np.int32))
    plan = op.plan(table=table.table, batch=batch)
    peft_model = PeftModel.from_pretrained(hf_model, folder)
    num_adapted = 0
    try:
        modules = dict(peft_model.base_model.model.named_modules())
        for layer in range(3):
            for module, sizes in enumerate(SHAPES):
                linear = modules[target.full_name((layer, module))]
                x = torch.randn(5, sizes.in_features)
                with torch.no_grad():
                    want = linear(x)
                    base = getattr(linear, "base_layer", linear)(x)
                got = base.clone()
                group = groups[module]
                apply_lora(op, plan, y=got, x=x, pool=pool.pages, layer=layer, group=group)
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
                is_adapted = hasattr(linear, "base_layer")
                assert (int(packed.rank[layer, module]) > 0) == is_adapted
                assert torch.equal(got, base) != is_adapted
                num_adapted += is_adapted
    finally:
        peft_model.unload()
    assert num_adapted > 0


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_key_that_would_backtrack_for_ever_matches_nothing(folder: Path, field: str) -> None:
    plain = read_adapter("mine", folder, make_target())
    edit_config(folder, **{field: {"(?:.?.?)*!": 5}})
    assert read_adapter("mine", folder, make_target()).content_hash == plain.content_hash


def test_all_linear_in_the_config(hf_model: PreTrainedModel, tmp_path: Path) -> None:
    """PEFT writes the list it found; configs written by hand say all-linear."""
    folder = make_adapter(hf_model, tmp_path / "adapter", r=2, alpha=4, targets="all-linear")
    before = read_adapter("a", folder, make_target())
    for spelling in ("all-linear", "ALL-linear", [module.name for module in llama_modules()]):
        edit_config(folder, target_modules=spelling)
        assert read_adapter("a", folder, make_target()).content_hash == before.content_hash


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_harmless_options_accepted(folder: Path, init: Any) -> None:
    edit_config(folder, init_lora_weights=init, revision="main", lora_dropout=0.1, task_type=None)
    (folder / "README.md").write_text("more files do no harm")
    (folder / "adapter_model.bin").write_bytes(b"neither does this one")
    read_adapter("mine", folder, make_target())


def test_unsloths_regex_is_not_too_complex(folder: Path) -> None:
    edit_config(
        folder,
        target_modules=r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn)"
        r".*?(?:q_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp"
        r"|feed_forward|ffn|dense)\.(?:(?:q_proj|down_proj)))",
    )
    read_adapter("mine", folder, make_target())


@pytest.mark.parametrize(
    "changes",
    [
        {"ensure_weight_tying": True},
        {"fan_in_fan_out": True},  # PEFT switches it off for torch.nn.Linear
        {"velora_config": {"num_groups": 4}},
        {"megatron_config": {"x": 1}},
        {"loraplus_lr_ratio": 16.0},
        {"some_future_option": 3},
        {"target_modules": ["q_proj", "down_proj", "query_key_value", "gate"]},
    ],
    ids=str,
)
def test_what_peft_loads_with_equal_results_is_served(
    hf_model: PreTrainedModel, folder: Path, changes: dict[str, Any]
) -> None:
    plain = read_adapter("mine", folder, make_target())
    edit_config(folder, **changes)
    if "megatron_config" not in changes:  # PEFT itself needs megatron.core for it
        PeftModel.from_pretrained(hf_model, folder).unload()
    assert read_adapter("mine", folder, make_target()).content_hash == plain.content_hash
