"""LoRAMix through a client and the whole engine in one thread, with a fake worker."""

from pathlib import Path
from typing import Any

import pytest

from loraplex import LoRAMix, LoRARequest
from loraplex.engine.errors import UnknownAdapterError
from loraplex.entrypoints.offline.batch_request import make_batch

from helpers.fakes.fake_engine import VOCAB_SIZE
from helpers.fakes.fake_model import oracle, sampling_spec
from helpers.fakes.in_process_client import TEN, InProcessClient, last


def expected(prompt: list[int], *weights: str) -> list[int]:
    spec = sampling_spec(max_tokens=10)
    return oracle(prompt, sorted((0, text) for text in weights), spec, 1 << 20, VOCAB_SIZE)[0]


def test_a_mix_of_names_and_folders(client: InProcessClient, tmp_path: Path) -> None:
    client.load_adapter("one", str(tmp_path / "a"))
    mix = LoRAMix([("one", 0.5), (LoRARequest("two", 2, str(tmp_path / "b")), -2)])
    output = last(client.generate([1, 2], TEN, adapter=mix))
    want = expected([1, 2], "content of a * 0.5", "content of b * -2.0")
    assert output.outputs[0].token_ids == want
    assert output.lora_request is mix
    again = last(client.generate([1, 2], TEN, adapter=LoRAMix([("two", -2), ("one", 0.5)])))
    assert again.outputs[0].token_ids == want
    plain = last(client.generate([1, 2], TEN, adapter=LoRAMix(["one"])))
    assert plain.outputs[0].token_ids == expected([1, 2], "content of a")
    assert client.list_adapters("two")[0]["usage"]["num_ended"] == 2
    with pytest.raises(UnknownAdapterError, match="'nobody'"):
        last(client.generate([1], TEN, adapter=LoRAMix(["one", "nobody"])))


@pytest.mark.parametrize(
    ("parts", "error", "text"),
    [
        ([], ValueError, "1 to 8 adapters, got 0"),
        ([f"a{i}" for i in range(9)], ValueError, "got 9"),
        (["a", ("a", 0.5)], ValueError, "once"),
        ([("a", 0.0)], ValueError, "not 0"),
        ([("a", float("inf"))], ValueError, "finite"),
        ([("a", "0.5")], TypeError, "must be a number"),
        ([3], TypeError, "LoRARequests or names"),
    ],
)
def test_bad_mixes_are_refused_at_once(parts: Any, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        LoRAMix(parts)


def test_mixes_in_an_offline_call() -> None:
    """Paths become absolute, and a name has one path in all of a call."""
    mix = LoRAMix([LoRARequest("a", 1, "x"), "b"])
    prompts: list[dict[str, Any]] = [{"prompt_token_ids": [1]}, {"prompt_token_ids": [2]}]
    (first, second) = make_batch(prompts, None, [mix, None], None)
    assert isinstance(first.adapter, LoRAMix) and second.adapter is None
    assert [part.lora_path for part, _ in first.adapter.parts] == [str(Path("x").absolute()), ""]
    with pytest.raises(ValueError, match="'a' has two paths"):
        make_batch(prompts, None, [mix, LoRARequest("a", 1, "y")], None)
    with pytest.raises(TypeError, match="lora_request must be LoRARequest or a list"):
        make_batch(prompts, None, "a", None)  # type: ignore[arg-type]
