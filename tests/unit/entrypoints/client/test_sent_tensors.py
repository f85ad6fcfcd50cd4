"""Tensors of a trainer as a safetensors file, judged by the safetensors library."""

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load

from loraplex.entrypoints.client.tensors.peft_model import config_map, peft_parts
from loraplex.entrypoints.client.tensors.sent_tensors import SentTensors

TENSORS = {
    "whole": torch.arange(12.0).view(3, 4),
    "transposed": torch.arange(12.0).view(3, 4).T,
    "trained": torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16)),
    "half": torch.randn(2, 2, generator=torch.Generator().manual_seed(1)).half(),
    "scalar": torch.tensor(3.0, dtype=torch.float64),
    "empty": torch.zeros(0, 4),
}


def content(tensors: SentTensors) -> bytes:
    file = tensors.write()
    with open(file.fd, "rb", closefd=False) as stream:
        read = stream.read()
    file.close()
    assert len(read) == tensors.num_bytes
    return read


def check_equal(read: dict[str, torch.Tensor], expected: dict[str, Any]) -> None:
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor.detach()), name


def test_the_file_holds_the_tensors() -> None:
    check_equal(load(content(SentTensors(TENSORS))), TENSORS)


@pytest.mark.parametrize("max_bytes", [1, 7, 1 << 20])
def test_the_frames_are_the_file(max_bytes: int) -> None:
    tensors = SentTensors(TENSORS)
    frames = tensors.frames(max_bytes)
    assert all(0 < len(frame) <= max_bytes for frame in frames)
    assert b"".join(frames) == content(tensors)


def test_frames_on_the_cpu_are_no_copies() -> None:
    tensor = torch.zeros(1000)
    frames = SentTensors({"x": tensor}).frames(1 << 20)
    tensor.fill_(1.0)
    assert b"".join(frames[1:]) == np.ones(1000, np.float32).tobytes()


def test_arrays_of_numpy() -> None:
    arrays = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "y": np.ones(3, np.float16)}
    expected = {name: torch.from_numpy(array) for name, array in arrays.items()}
    check_equal(load(content(SentTensors(arrays))), expected)


class _Spread:
    def full_tensor(self) -> torch.Tensor:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.arange(3), "floating-point numbers, got torch.int64"),
        ("text", "must be a tensor"),
        (_Spread(), "send its full_tensor"),
    ],
)
def test_other_values_are_refused_by_name(value: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text) as error:
        SentTensors({"good": torch.ones(1), "layers.0.bad": value})
    assert "layers.0.bad" in str(error.value)


def test_a_config_of_peft_is_a_map_of_plain_values() -> None:
    config = LoraConfig(r=4, target_modules=["v_proj", "q_proj"], task_type="CAUSAL_LM")
    values = config_map(config)
    assert values["target_modules"] == ["q_proj", "v_proj"]
    assert (values["peft_type"], values["task_type"], values["r"]) == ("LORA", "CAUSAL_LM", 4)
    assert config_map({"r": 4}) == {"r": 4}
    with pytest.raises(TypeError, match="a map or a PeftConfig, got str"):
        config_map("adapter_config.json")


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(TypeError, match="a PeftModel was expected, got Linear"):
        peft_parts(torch.nn.Linear(2, 2))
