"""Names, fields and places that scripts written for vLLM import."""

from importlib import import_module
from pathlib import Path

import pytest

import loraplex
from loraplex.lora.request import LoRARequest


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("loraplex.lora.request", ["LoRARequest"]),
        ("loraplex.sampling_params", ["RequestOutputKind", "SamplingParams"]),
        ("loraplex.outputs", ["CompletionOutput", "RequestOutput"]),
        ("loraplex.engine.arg_utils", ["AsyncEngineArgs", "EngineArgs"]),
        ("loraplex.v1.engine.async_llm", ["AsyncLLM"]),
    ],
)
def test_modules_offer_the_classes_of_the_package(module: str, names: list[str]) -> None:
    for name in names:
        assert getattr(import_module(module), name) is getattr(loraplex, name)


def test_prompts_are_typed_maps() -> None:
    from loraplex.inputs import TextPrompt, TokensPrompt

    assert TextPrompt(prompt="hi") == {"prompt": "hi"}
    assert TokensPrompt(prompt_token_ids=[1]) == {"prompt_token_ids": [1]}


def test_the_fields_of_a_lora_request_have_vllms_order() -> None:
    request = LoRARequest("sql", 3, "/a", "base", load_inplace=True)
    assert (request.lora_name, request.lora_int_id, request.lora_path) == ("sql", 3, "/a")
    assert (request.base_model_name, request.load_inplace) == ("base", True)
    with pytest.raises(TypeError, match="base_model_name"):
        LoRARequest("sql", 3, "/a", True)  # type: ignore[arg-type]


def test_a_lora_path_may_be_a_path() -> None:
    assert LoRARequest("sql", 1, Path("/a/b")).lora_path == "/a/b"  # type: ignore[arg-type]


def test_the_parser_of_flags_is_in_both_places() -> None:
    from loraplex.utils import FlexibleArgumentParser, random_uuid
    from loraplex.utils.argparse_utils import FlexibleArgumentParser as Newer

    assert FlexibleArgumentParser is Newer
    assert len({random_uuid() for _ in range(9)}) == 9


@pytest.mark.parametrize(
    ("name", "mend"),
    [("logits_processors", "use logit_bias"), ("best_of", "use n"), ("extra_args", "leave it out")],
)
def test_sampling_parameters_of_vllm_alone_are_refused_with_the_mend(name: str, mend: str) -> None:
    with pytest.raises(TypeError, match=f"SamplingParams has no {name}: {mend}"):
        loraplex.SamplingParams(**{name: None})
