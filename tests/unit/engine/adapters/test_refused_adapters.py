"""PEFT directories that cannot be served are refused with the reason."""

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.engine.adapters.peft_files import WEIGHTS_FILE, read_adapter
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import AdapterError
from loraplex.engine.model.shard import whole_modules
from loraplex.engine.store_config import StoreConfig
from loraplex.engine.stores.deadline import Deadline
from loraplex.engine.stores.folder_store import FolderStore
from loraplex.engine.stores.open_stores import adapter_roots
from loraplex.engine.stores.store_address import StoreAddress
from loraplex.memory.adapter_layout import ModuleShape

from helpers.models.peft_folders import (
    CONFIG_FILE,
    Q0,
    SHAPES,
    edit_config,
    edit_weights,
    make_target,
)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"peft_type": None}, "only LORA"),
        ({"use_dora": True}, "no magnitude, which DoRA needs"),
        ({"lora_bias": True}, "no bias on lora_B"),
        ({"use_dora": True, "lora_bias": True}, "use_dora beside lora_bias"),
        ({"bias": "all"}, "biases"),
        ({"bias": "lora"}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "lm_head is trained, but the file has no weights of it"),
        ({"modules_to_save": ["norm"]}, "modules_to_save.*whole modules"),
        ({"trainable_token_indices": [1]}, "embed_tokens .*no token rows"),
        ({"layer_replication": [[0, 2]]}, "repeats layers"),
        ({"target_parameters": ["x"]}, "bare parameters"),
        ({"alora_invocation_tokens": []}, "1 to 1024 token ids"),
        ({"alora_invocation_tokens": [5, "x"]}, "1 to 1024 token ids"),
        ({"alora_invocation_tokens": [5], "use_dora": True}, "use_dora beside alora.*by PEFT"),
        ({"alora_invocation_tokens": [5], "bias": "lora_only"}, "before the invocation"),
        ({"use_qalora": True}, "QALoRA"),
        ({"arrow_config": {"top_k": 3}}, "Arrow"),
        ({"kasa_config": {"beta": 1}}, "KaSA"),
        ({"monteclora_config": {"num_samples": 8}}, "MonteCLoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "block-diagonal"),
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
        ({"lora_alpha": 10**400}, "lora_alpha must be a finite number"),
        ({"lora_alpha": 1e40}, "which float32 cannot hold"),
        ({"lora_alpha": 1e-45}, "which float32 cannot hold"),
        ({"alpha_pattern": {"q_proj": 10**400}}, "alpha_pattern.*finite number"),
        ({"alpha_pattern": {"q_proj": -1e40}}, "q_proj the scale.*float32 cannot hold"),
        ({"r": 10**400}, "r must be a positive integer"),
        ({"lora_alpha": math.nan}, "lora_alpha must be a finite number"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern.*finite number"),
        ({"target_modules": None}, "target_modules must be"),
        ({"target_modules": []}, "target_modules must be"),
        ({"target_modules": [3]}, "target_modules must be"),
        ({"target_modules": "nothing_like_it"}, "match nothing"),
        ({"target_modules": ["query_key_value"]}, "match nothing"),
        ({"target_modules": ["q_proj", "down_proj", "lm_head"]}, "lm_head .*has no lora_A"),
        ({"target_modules": ["q_proj", "down_proj", "embed_tokens"]}, "embed_tokens .*no lora_A"),
        ({"target_modules": ".*"}, "embed_tokens is trained.* no lora_A"),
        ({"target_modules": "(q_proj"}, "cannot use the regular expression"),
        ({"target_modules": "(a+)+b"}, "match nothing"),
        ({"target_modules": "(?:.?.?)*!"}, "match nothing"),
        ({"target_modules": "(?=q)q_proj"}, r"\(\?= \(lookaround and back.* not supported"),
        ({"target_modules": "(q|k)_\\1"}, r"\\1 \(lookaround and back.* not supported"),
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
    "head": (
        _set(PREFIX + "lm_head.lora_A.weight", lambda a: a), "lora_A of lm_head, which the config",
    ),
    "embedding": (
        _set(PREFIX + "model.embed_tokens.lora_embedding_A", lambda a: a), "config leaves out",
    ),
    "dora": (
        _set(PREFIX + "model.layers.0.self_attn.q_proj.lora_magnitude_vector", lambda a: a),
        "a magnitude, which DoRA needs, but the config does not say use_dora",
    ),
    "base bias": (
        _set(PREFIX + "model.layers.0.self_attn.q_proj.base_layer.bias", lambda a: a),
        "a trained bias, but the config does not say bias='lora_only'",
    ),
    "lora bias": (
        _set(PREFIX + "model.layers.0.self_attn.q_proj.lora_B.bias", lambda a: a), "bias on lora_B",
    ),
    "saved module": (
        _set(PREFIX + "lm_head.modules_to_save.weight", lambda a: a), "the base model.s are random",
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
        (
            {"modules": whole_modules(wider)},
            "q_proj is 64 -> 64 .*96 -> 64 .*another base.*meta/other",
        ),
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


@pytest.mark.parametrize("name", [WEIGHTS_FILE, CONFIG_FILE, "the folder"])
def test_a_path_swapped_after_its_registration_is_not_served(
    folder: Path, tmp_path: Path, name: str
) -> None:
    root = tmp_path / "root"
    outside = tmp_path / "outside"
    shutil.copytree(folder, root / "a")
    shutil.copytree(folder, outside)
    target = make_target(adapter_roots=(str(root),))
    read_adapter("mine", root / "a", target)
    if name == "the folder":
        shutil.rmtree(root / "a")
        (root / "a").symlink_to(outside)
    else:
        (root / "a" / name).unlink()
        (root / "a" / name).symlink_to(outside / name)
    with pytest.raises(AdapterError, match="leads out of .*/root, its adapter_root"):
        read_adapter("mine", root / "a", target)


@pytest.mark.parametrize("name", [WEIGHTS_FILE, CONFIG_FILE])
def test_no_link_in_a_store_leads_to_another_tenants_files(
    folder: Path, tmp_path: Path, name: str
) -> None:
    """Ann puts the link into her folder; the folder itself may be a link of the operator's."""
    ann, link = tmp_path / "disk" / "ann", tmp_path / "store" / "ann"
    shutil.copytree(folder, ann / "legal")
    shutil.copytree(folder, tmp_path / "store" / "ben" / "legal")
    link.symlink_to(ann)
    uri = f"{tmp_path}/store/{{tenant}}"
    config = EngineConfig(store=StoreConfig(adapter_stores=(uri,)))
    target = make_target(adapter_roots=adapter_roots(config))
    found = FolderStore(StoreAddress.parse(uri)).find("legal", "ann", Deadline(60))
    assert found is not None
    read_adapter("legal", Path(found.source.path), target)
    (ann / "legal" / name).unlink()
    (ann / "legal" / name).symlink_to(tmp_path / "store" / "ben" / "legal" / name)
    with pytest.raises(AdapterError, match="leads out of .*/ann, its adapter_root or store"):
        read_adapter("legal", Path(found.source.path), target)
