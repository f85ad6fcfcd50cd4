"""Flags to configuration and back out of the help text."""

import argparse
import dataclasses
from dataclasses import dataclass, field

import pytest

from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.entrypoints.cli import flag_types, flags
from loraplex.entrypoints.cli import main as cli


def parse(*argv: str) -> argparse.Namespace:
    return cli.make_parser().parse_args(argv)


def test_no_flags_give_the_defaults() -> None:
    assert flags.engine_config_of(parse("serve")) == EngineConfig()


def test_every_part_is_reached() -> None:
    config = flags.engine_config_of(
        parse(
            "serve", "--model", "m", "--dtype", "bfloat16", "--max-model-len", "77",
            "--adapter", "a=/x", "--adapter", "b=/y=z", "--adapter-root", "/r",
            "--no-enable-prefix-caching", "--pool-bytes", "1.5G", "--max-num-seqs", "3",
            "--lora-backend", "torch", "--endpoint", "ipc:///tmp/s", "--insecure",
        )
    )  # fmt: skip
    assert (config.model.model, config.model.dtype) == ("m", "bfloat16")
    assert config.model.max_model_len == 77
    assert config.adapter.adapters == (("a", "/x"), ("b", "/y=z"))
    assert config.adapter.adapter_root == "/r"
    assert config.memory.enable_prefix_caching is False
    assert config.memory.pool_bytes == 3 << 29
    assert config.scheduler.max_num_seqs == 3
    assert config.backend.lora_backend == "torch"
    assert config.server.endpoint == "ipc:///tmp/s"
    assert config.server.insecure is True


def test_a_model_without_a_flag_and_vllms_names() -> None:
    args = parse("serve", "m", "--enable-lora", "--max-loras", "5", "--enable-prefix-caching")
    config = flags.engine_config_of(args)
    assert (config.model.model, config.memory.max_adapter_slots) == ("m", 5)
    assert flags.engine_config_of(parse("serve", "--model", "m")).model.model == "m"
    assert parse("generate", "hi", "--max-loras", "5").prompts == ["hi"]


@pytest.mark.parametrize(
    ("argument", "advice"),
    [
        ("--max-model-length=5", "did you mean --max-model-len?"),
        ("--max_model_len", "did you mean --max-model-len?"),
        ("-max-model-len", "did you mean --max-model-len?"),
        ("--max-cpu-loras", "use --adapter-host-bytes"),
        ("--lora-modules", "use --adapter NAME=PATH"),
        ("--hf-token", "nothing is downloaded"),
        ("--zzz", "--help lists the flags"),
        ("second", "unrecognized argument second"),
    ],
)
def test_unknown_flags_are_errors_with_advice(
    argument: str, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("serve", "m", argument)
    assert caught.value.code == 2
    assert advice in capsys.readouterr().err


def test_sampling_flags() -> None:
    params = flags.sampling_params_of(
        parse(
            "generate", "hi", "--temperature", "0", "--top-p", "0.5", "--stop", "a", "--stop", "b",
            "--stop-token-ids", "1,2", "--logit-bias", "5=-1.5", "--logit-bias", "6=2",
            "--ignore-eos", "--no-skip-special-tokens", "--logprobs", "3", "--n", "2",
        )
    )  # fmt: skip
    assert params == SamplingParams(
        temperature=0.0, top_p=0.5, stop=["a", "b"], stop_token_ids=[1, 2], max_tokens=256,
        logit_bias={5: -1.5, 6: 2.0}, ignore_eos=True, skip_special_tokens=False, logprobs=3, n=2,
    )  # fmt: skip


def test_sampling_defaults_but_for_the_length() -> None:
    assert flags.sampling_params_of(parse("generate", "hi")) == SamplingParams(max_tokens=256)
    model = {"temperature": 0.2, "top_p": 0.9, "max_tokens": 5}
    args = parse("generate", "hi", "--top-p", "0.5")
    assert flags.sampling_params_of(args, model) == SamplingParams(
        temperature=0.2, top_p=0.5, max_tokens=256
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["serve", "--block-tokens", "12"], "block_tokens must be a power of two"),
        (["serve", "--max-num-seqs", "0"], "max_num_seqs must be at least 1"),
        (["serve", "--gpu-memory-utilization", "2"], "gpu_memory_utilization"),
    ],
)
def test_values_out_of_range(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        flags.engine_config_of(parse(*argv))


def test_bad_sampling_values() -> None:
    with pytest.raises(ConfigError, match="top_p must lie in"):
        flags.sampling_params_of(parse("generate", "hi", "--top-p", "3"))


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("4096", 4096), ("1k", 1024), ("512M", 512 << 20), ("2.5GiB", 5 << 29), ("1TB", 1 << 40)],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert flag_types.parse_size(text) == num_bytes


@pytest.mark.parametrize("num_bytes", [0, 1, 1023, 1024, 3 << 19, 4 << 30, (4 << 30) + 1])
def test_sizes_are_shown_as_they_are_read(num_bytes: int) -> None:
    assert flag_types.parse_size(flag_types.format_size(num_bytes)) == num_bytes


@pytest.mark.parametrize("text", ["", "b", "G", "12x", "1..5G", "infG", "nan"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="no size"):
        flag_types.parse_size(text)


@pytest.mark.parametrize(
    "argv",
    [
        ["--adapter", "pathonly"], ["--adapter", "=p"], ["--adapter", "n="], ["--dtype", "int4"],
        ["--lora-backend", "nope"], ["--max-num", "4"], ["--pool-bytes", "lots"],
        ["--max-model-len", "many"], ["--device", "tpu"],
    ],
)  # fmt: skip
def test_usage_errors_exit_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("serve", *argv)
    assert caught.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_help_shows_defaults_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("serve", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 256)" in text
    assert "(default: yes)" in text
    assert "{auto,float32,bfloat16,float16}" in text
    assert "--lora-backend {auto," in text
    assert "==SUPPRESS==" not in text


def test_every_hint_of_the_configuration_has_a_kind() -> None:
    @dataclass
    class Odd:
        odd: set[int] = field(default_factory=set, metadata={"help": "x"})

    with pytest.raises(TypeError, match="no flag can be made for odd"):
        flags.add_flags(argparse.ArgumentParser(), Odd, title="odd")


def test_help_texts_survive_percent_signs() -> None:
    @dataclass
    class Share:
        share: float = field(default=0.5, metadata={"help": "50 % of it"})

    parser = argparse.ArgumentParser()
    flags.add_flags(parser, Share, title="share")
    assert "50 % of it (default: 0.5)" in parser.format_help()
    assert flags.values_of(parser.parse_args(["--share", "1"]), Share) == {"share": 1.0}
    assert dataclasses.asdict(Share(**flags.values_of(parser.parse_args([]), Share)))
