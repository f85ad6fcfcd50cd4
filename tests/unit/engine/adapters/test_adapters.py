"""PEFT directories: what real PEFT saves is read, and what cannot be honoured is refused."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from loraplex.backends.lora.contract import LoRAGroup, LoRASpec, apply_lora
from loraplex.backends.lora.torch_bmm import TorchLoRA
from loraplex.engine.adapters.peft_files import (
    WEIGHTS_FILE,
    AdapterTarget,
    module_name,
    read_adapter,
)
from loraplex.engine.adapters.table import AdapterTable, group_rows
from loraplex.engine.errors import AdapterError
from loraplex.memory.adapter_layout import MODULES, ROW_ALIGN, ModuleShape
from loraplex.memory.device.pool import PagePool, PageShape

from helpers.models.hf_models import make_hf_model
from helpers.models.peft_adapters import make_adapter

CONFIG_FILE = "adapter_config.json"
SHAPES = (
    ModuleShape(64, 64), ModuleShape(64, 32), ModuleShape(64, 32), ModuleShape(64, 64),
    ModuleShape(64, 160), ModuleShape(64, 160), ModuleShape(160, 64),
)  # fmt: skip
BLOCK_TOKENS = 16
PAGE_ELEMS = BLOCK_TOKENS * 2 * 2 * 16


def make_target(**overrides: Any) -> AdapterTarget:
    values = {
        "num_layers": 3,
        "shapes": SHAPES,
        "page_elems": PAGE_ELEMS,
        "dtype": torch.float32,
        "max_rank": 64,
    }
    return AdapterTarget(**{**values, **overrides})


@pytest.fixture(scope="module")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return make_hf_model("llama", tmp_path_factory.mktemp("base"))


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
                linear = modules[module_name(layer, module)]
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


@pytest.fixture
def folder(hf_model: PreTrainedModel, tmp_path: Path) -> Path:
    return make_adapter(
        hf_model, tmp_path / "adapter", r=4, alpha=8, targets=["q_proj", "down_proj"]
    )


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()},
        folder / WEIGHTS_FILE,
    )


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"peft_type": None}, "only LORA"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases"),
        ({"bias": "lora_only"}, "biases"),
        ({"lora_bias": True}, "bias on lora_B"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save.*whole modules"),
        ({"trainable_token_indices": [1]}, "embeddings"),
        ({"layer_replication": [[0, 2]]}, "repeats layers"),
        ({"target_parameters": ["x"]}, "bare parameters"),
        ({"alora_invocation_tokens": [5]}, "activated LoRA"),
        ({"use_qalora": True}, "QALoRA"),
        ({"some_future_option": 3}, "some_future_option=3.*not known"),
        ({"init_lora_weights": "pissa"}, "changes the base weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
        ({"init_lora_weights": "olora"}, "changes the base weights"),
        ({"init_lora_weights": "loftq"}, "changes the base weights"),
        ({"init_lora_weights": "corda"}, "changes the base weights"),
        ({"r": 0}, "r must be a positive integer"),
        ({"r": -1}, "r must be a positive integer"),
        ({"r": 4.0}, "r must be a positive integer"),
        ({"r": True}, "r must be a positive integer"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.*positive integer"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must be a map"),
        ({"lora_alpha": 0}, "lora_alpha must be a finite number other than 0"),
        ({"lora_alpha": "8"}, "lora_alpha must be a finite number"),
        ({"lora_alpha": math.nan}, "lora_alpha must be a finite number"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern.*finite number"),
        ({"target_modules": None}, "target_modules must be"),
        ({"target_modules": []}, "target_modules must be"),
        ({"target_modules": [3]}, "target_modules must be"),
        ({"target_modules": "nothing_like_it"}, "match nothing"),
        ({"target_modules": ["q_proj", "down_proj", "query_key_value"]}, "'query_key_value' match"),
        ({"target_modules": ["q_proj", "down_proj", "lm_head"]}, "lm_head.*not supported"),
        ({"target_modules": ["q_proj", "down_proj", "embed_tokens"]}, "embed_tokens.*not supp"),
        ({"target_modules": ".*"}, "lm_head.*not supported"),
        ({"target_modules": "(q_proj"}, "cannot use the regular expression"),
        ({"target_modules": "(a+)+b"}, "match nothing"),
        ({"target_modules": "(?:.?.?)*!"}, "match nothing"),
        ({"target_modules": "(?=q)q_proj"}, r"\(\?= \(lookaround and back.* not supported"),
        ({"target_modules": "(q|k)_\\1"}, r"\\\\1 \(lookaround and back.* not supported"),
        ({"exclude_modules": "a{1001}"}, "exclude_modules: .* repetition size"),
        ({"target_modules": "a" * 3000}, "longer than"),
        ({"rank_pattern": {"(?<!k)proj": 4}}, "rank_pattern: .*lookaround"),
        ({"layers_to_transform": [0], "layers_pattern": "(?:.?.?)*!"}, "match nothing"),
        ({"layers_to_transform": ["0"]}, "layer numbers"),
        ({"layers_to_transform": [7]}, "match nothing"),
        ({"target_modules": ["q_proj", "down_proj", "k_proj"]}, "k_proj.*no weights"),
        ({"target_modules": "all-linear"}, "name .*no weights"),
        ({"target_modules": ["q_proj"]}, "config leaves out"),
        ({"layers_to_transform": [0]}, "config leaves out"),
        ({"exclude_modules": ["q_proj"]}, "config leaves out"),
        ({"r": 8}, "rank 4 in lora_A and 4 in lora_B, but 8"),
        ({"rank_pattern": {"q_proj": 2}}, "q_proj has rank 4 .*but 2"),
    ],
    ids=str,
)  # fmt: skip
def test_config_refused(folder: Path, changes: dict[str, Any], reason: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(AdapterError, match=rf"adapter 'mine': .*{reason}"):
        read_adapter("mine", folder, make_target())


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_key_that_would_backtrack_for_ever_matches_nothing(folder: Path, field: str) -> None:
    plain = read_adapter("mine", folder, make_target())
    edit_config(folder, **{field: {"(?:.?.?)*!": 5}})
    assert read_adapter("mine", folder, make_target()).content_hash == plain.content_hash


def _drop(side: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(Q0.format(side))


def _set(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = value(tensors[Q0.format("A")])

    return change


def _poison(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q0.format("B")][3, 1] = value

    return change


PREFIX = "base_model.model."
WEIGHT_CASES: dict[str, tuple[Callable[[Any], None], str]] = {
    "no A": (_drop("A"), "q_proj has no lora_A"),
    "no B": (_drop("B"), "q_proj has no lora_B"),
    "other width": (_set(Q0.format("A"), lambda a: a[:, :48]), "another base"),
    "rank of A": (_set(Q0.format("A"), lambda a: a[:3]), "rank 3 in lora_A and 4 in lora_B"),
    "rank of both": (
        lambda t: t.update({Q0.format("A"): t[Q0.format("A")][:2],
                            Q0.format("B"): t[Q0.format("B")][:, :2]}),
        "rank 2 in lora_A and 2 in lora_B, but 4",
    ),
    "vector": (_set(Q0.format("A"), lambda a: a[0]), "no matrix"),
    "integers": (_set(Q0.format("A"), lambda a: a.int()), "no matrix of floating"),
    "nan": (_poison(math.nan), "NaN or infinite"),
    "inf": (_poison(math.inf), "NaN or infinite"),
    "unknown layer": (
        _set(PREFIX + "model.layers.9.self_attn.q_proj.lora_A.weight", lambda a: a),
        "no such module",
    ),
    "unknown module": (
        _set(PREFIX + "model.layers.0.mlp.router.lora_A.weight", lambda a: a), "no such module",
    ),
    "head": (_set(PREFIX + "lm_head.lora_A.weight", lambda a: a), "no such module"),
    "embedding": (
        _set(PREFIX + "model.embed_tokens.lora_embedding_A", lambda a: a), "LoRA on embeddings",
    ),
    "dora": (
        _set(PREFIX + "model.layers.0.self_attn.q_proj.lora_magnitude_vector", lambda a: a),
        "DoRA",
    ),
    "lora bias": (
        _set(PREFIX + "model.layers.0.self_attn.q_proj.lora_B.bias", lambda a: a), "bias on lora_B",
    ),
    "saved module": (
        _set(PREFIX + "lm_head.modules_to_save.weight", lambda a: a), "whole modules",
    ),
    "no lora": (_set(PREFIX + "model.norm.weight", lambda a: a), "no LoRA weight"),
    "other prefix": (_set("model.layers.0.self_attn.q_proj.lora_A.weight", lambda a: a),
                     "no LoRA weight"),
    "twice": (_set(Q0.format("A").replace(".weight", ".default.weight"), lambda a: a), "twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", WEIGHT_CASES)
def test_weights_refused(folder: Path, case: str) -> None:
    change, reason = WEIGHT_CASES[case]
    edit_weights(folder, change)
    with pytest.raises(AdapterError, match=rf"adapter 'mine': .*{reason}"):
        read_adapter("mine", folder, make_target())


def test_files_refused(folder: Path, tmp_path: Path) -> None:
    def refused(reason: str, path: Path = folder) -> None:
        with pytest.raises(AdapterError, match=reason):
            read_adapter("mine", path, make_target())

    refused("no directory", tmp_path / "absent")
    weights, config = (folder / WEIGHTS_FILE), (folder / CONFIG_FILE)
    data, text = weights.read_bytes(), config.read_text()
    weights.write_bytes(data[: len(data) // 2])
    refused("damaged")
    weights.write_bytes(b"\xff" * 64)
    refused("damaged")
    weights.unlink()
    refused("no adapter_model.safetensors")
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    refused("adapter_model.bin is a pickle file")
    os.mkfifo(weights)
    refused("no regular file")
    weights.unlink()
    with weights.open("wb") as file:
        file.truncate(1 << 40)
    refused("more than any adapter")
    weights.write_bytes(data)
    for content, reason in (
        (b"{", "no valid JSON"), (b"[1]", "JSON object"), (b"\xff\xfe\x00", "JSON"),
        (b"[" * 100_000, "JSON"), (b" " * (5 << 20), "larger"),
    ):  # fmt: skip
        config.write_bytes(content)
        refused(reason)
    config.unlink()
    refused("no adapter_config.json")
    os.mkfifo(config)
    refused("no regular file")
    config.unlink()
    config.write_text(text)
    read_adapter("mine", folder, make_target())


def test_other_base_and_limits_refused(folder: Path) -> None:
    wider = (ModuleShape(96, 64), *SHAPES[1:])
    edit_config(folder, base_model_name_or_path="meta/other")
    for changes, reason in (
        ({"shapes": wider}, "q_proj is 64 -> 64 .*96 -> 64 .*another base.*meta/other"),
        ({"num_layers": 2}, "no such module"),
        ({"num_layers": 4}, r"layers\.3.*no weights"),
        ({"max_rank": 3}, "rank 4, above max_lora_rank 3"),
    ):
        with pytest.raises(AdapterError, match=reason):
            read_adapter("mine", folder, make_target(**changes))
    edit_weights(folder, _poison(1e6))
    read_adapter("mine", folder, make_target())
    with pytest.raises(AdapterError, match="some that torch.float16 cannot"):
        read_adapter("mine", folder, make_target(dtype=torch.float16))


def test_all_linear_in_the_config(hf_model: PreTrainedModel, tmp_path: Path) -> None:
    """PEFT writes the list it found; configs written by hand say all-linear."""
    folder = make_adapter(hf_model, tmp_path / "adapter", r=2, alpha=4, targets="all-linear")
    before = read_adapter("a", folder, make_target())
    for spelling in ("all-linear", "ALL-linear", list(MODULES)):
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
