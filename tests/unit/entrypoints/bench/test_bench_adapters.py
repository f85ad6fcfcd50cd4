"""Random adapters that share files of weights."""

import json
from pathlib import Path

import pytest
import torch

from loraplex.engine.adapters.peft_files import read_adapter
from loraplex.engine.adapters.target import AdapterTarget
from loraplex.engine.model.shard import whole_modules
from loraplex.entrypoints.bench import dummy
from loraplex.entrypoints.bench.names import MODULES
from loraplex.memory.adapter_layout import ModuleShape


def tiny_target() -> AdapterTarget:
    shapes = ((64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64))
    return AdapterTarget(
        num_layers=2,
        modules=whole_modules(tuple(ModuleShape(*shape) for shape in shapes)),
        page_elems=16 * 2 * 32,
        dtype=torch.bfloat16,
        max_rank=16,
    )


@pytest.mark.parametrize(("ranks", "num_files"), [([4], 3), ([8, 4], 3), ([8, 4, 2], 1)])
def test_adapters_that_share_files_differ_in_content(
    tmp_path: Path, ranks: list[int], num_files: int
) -> None:
    writer = dummy.AdapterWriter(
        dummy.model_config("tiny"), ranks=ranks, modules=MODULES, num_weight_files=num_files
    )
    seen = set()
    written = 0
    for index in range(25):
        path = writer.write(tmp_path / f"a{index}", index)
        packed = read_adapter(f"a{index}", path, tiny_target())
        assert int(packed.rank.max()) == ranks[index % len(ranks)]
        assert float(packed.scale.max()) == pytest.approx(1.0, abs=0.01)
        seen.add(packed.content_hash)
        written += not (path / "adapter_model.safetensors").is_symlink()
        weights = (path / "adapter_model.safetensors").stat().st_size
        assert 0 < weights - writer.num_bytes(index) < 8192  # the rest is the header
    assert len(seen) == 25
    assert written == -(-num_files // len(ranks)) * len(ranks)


def test_ten_thousand_adapters_have_ten_thousand_scales(tmp_path: Path) -> None:
    writer = dummy.AdapterWriter(
        dummy.model_config("tiny"), ranks=[8], modules=["q"], num_weight_files=1
    )
    seen = set()
    for index in (0, 1, 2, 4095, 4096, 9999):
        path = writer.write(tmp_path / str(index), index)
        alpha = json.loads((path / "adapter_config.json").read_text())["lora_alpha"]
        seen.add(torch.tensor(alpha / 8, dtype=torch.float32).item())
    assert len(seen) == 6
