"""EngineArgs: a dataclass of keywords, and the flags that scripts of vLLM parse it from."""

from argparse import ArgumentParser
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any

import pytest

from loraplex import AsyncEngineArgs, EngineArgs
from loraplex.engine.config import EngineConfig
from loraplex.entrypoints.offline.options import engine_config_of
from loraplex.utils import FlexibleArgumentParser


def config_of(keywords: dict[str, Any]) -> EngineConfig:
    """Does what LLM(**keywords) does before it starts an engine."""
    keywords = dict(keywords)
    return engine_config_of(keywords.pop("model"), keywords)


@pytest.mark.parametrize("cls", [EngineArgs, AsyncEngineArgs])
def test_keywords_survive_the_round_trip(cls: type[EngineArgs]) -> None:
    args = cls("m", max_loras=3, dtype="half", enable_lora=False, adapters={"a": "/x"})
    assert is_dataclass(args)
    assert config_of(asdict(args)) == args.create_engine_config()
    assert cls(**asdict(args)) == args
    assert args.create_engine_config() == engine_config_of(
        "m", {"max_adapter_slots": 3, "dtype": "float16", "adapters": {"a": "/x"}}
    )


def test_defaults_are_the_configurations() -> None:
    assert config_of(asdict(EngineArgs())) == engine_config_of("", {})


def test_overrides_of_the_map_work() -> None:
    changed = config_of(asdict(EngineArgs("m")) | {"seed": 7, "max_loras": 2})
    assert (changed.model.seed, changed.memory.max_adapter_slots) == (7, 2)
    assert replace(EngineArgs("m", max_loras=2), max_loras=4).max_loras == 4


def test_equality_and_text_name_what_was_given() -> None:
    assert EngineArgs("m", seed=1) == EngineArgs("m", seed=1) != EngineArgs("m")
    assert repr(EngineArgs("m", max_loras=3)) == "EngineArgs(model='m', max_loras=3)"


def test_a_wrong_keyword_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="did you mean 'max_model_len'"):
        EngineArgs("m", max_model_length=3)
    with pytest.raises(ValueError, match="dtype must be one of"):
        EngineArgs("m", dtype="int4")


@pytest.mark.parametrize("in_group", [False, True])
def test_flags_become_keywords(in_group: bool) -> None:
    parser = FlexibleArgumentParser()
    target = parser.add_argument_group("engine") if in_group else parser
    assert EngineArgs.add_cli_args(target) is target
    target.set_defaults(model="m")
    parser.add_argument("--max-tokens", type=int)
    words = ["--max_loras=5", "--enforce-eager", "--dtype", "half", "--no-enable-lora"]
    words += ["--max_num_seqs", "4", "--no-enable-prefix-caching", "--adapter-dir", "a_b"]
    args = parser.parse_args(words)
    want = engine_config_of(
        "m",
        {"max_adapter_slots": 5, "enforce_eager": True, "dtype": "float16", "max_num_seqs": 4,
         "enable_prefix_caching": False, "adapter_dir": "a_b"},
    )  # fmt: skip
    assert EngineArgs.from_cli_args(args).create_engine_config() == want
    given = dict(vars(args))
    assert given.pop("max_tokens") is None
    assert config_of(given) == want


def test_every_keyword_of_a_plain_parser_has_its_default() -> None:
    parser = AsyncEngineArgs.add_cli_args(ArgumentParser())
    args = AsyncEngineArgs.from_cli_args(parser.parse_args([]))
    assert args == AsyncEngineArgs()
    names = {own.name for own in fields(args)}
    assert {"max_cpu_loras", "swap_space", "enable_log_requests", "max_adapter_slots"} <= names


def test_a_flag_that_would_change_answers_is_refused() -> None:
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args(["--runner", "pooling"])
    with pytest.raises(TypeError, match="only text is generated"):
        EngineArgs.from_cli_args(args)


def test_the_flags_of_an_async_engine_alone() -> None:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(), async_args_only=True)
    assert vars(parser.parse_args(["--enable_log_requests"])) == {"enable_log_requests": True}
