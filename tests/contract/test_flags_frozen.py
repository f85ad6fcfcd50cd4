"""The flags are part of the interface: a new or lost one shows here, for a reviewer to see."""

import argparse
import dataclasses

import pytest

from loraplex.engine.config import EngineConfig
from loraplex.entrypoints import cli, flags
from loraplex.scheduler.sampling_params import SamplingParams

MODEL = [
    "--chat-template", "--device", "--dtype", "--load-format", "--max-model-len", "--model",
    "--no-skip-tokenizer-init", "--seed", "--skip-tokenizer-init", "--tokenizer",
]  # fmt: skip
ENGINE = [
    *MODEL, "--adapter", "--adapter-dir", "--adapter-host-bytes", "--attention-backend",
    "--block-tokens", "--enable-prefix-caching", "--gpu-memory-utilization", "--lora-backend",
    "--max-adapter-slots", "--max-lora-rank", "--max-num-batched-tokens", "--max-num-seqs",
    "--max-queue-len", "--max-steps-in-flight", "--no-enable-prefix-caching", "--num-pages",
    "--pool-bytes",
]  # fmt: skip
SAMPLING = [
    "--frequency-penalty", "--ignore-eos", "--include-stop-str-in-output", "--logit-bias",
    "--logprobs", "--max-tokens", "--min-p", "--min-tokens", "--n", "--no-ignore-eos",
    "--no-include-stop-str-in-output", "--no-skip-special-tokens", "--presence-penalty",
    "--prompt-logprobs", "--repetition-penalty", "--skip-special-tokens", "--stop",
    "--stop-token-ids", "--temperature", "--top-k", "--top-p",
]  # fmt: skip
FROZEN = {
    "serve": [
        *ENGINE, "--adapter-root", "--client-public-keys-dir", "--endpoint", "--insecure",
        "--max-client-backlog", "--max-message-bytes", "--max-requests-per-client",
        "--no-insecure", "--server-secret-key-file", "--log-level",
    ],
    "generate": [
        *ENGINE, *SAMPLING, "--chat", "--compare", "--file", "--in-process", "--json",
        "--log-level", "--no-chat", "--system", "--use",
    ],
    "backends": ["--log-level"],
}  # fmt: skip


def subparsers() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in cli.make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def test_commands_are_frozen() -> None:
    assert set(subparsers()) == set(FROZEN)


@pytest.mark.parametrize("command", sorted(FROZEN))
def test_flags_are_frozen(command: str) -> None:
    seen = {s for a in subparsers()[command]._actions for s in a.option_strings}
    assert sorted(seen - {"-h", "--help"}) == sorted(FROZEN[command])


@pytest.mark.parametrize("command", sorted(FROZEN))
def test_every_flag_has_help(command: str) -> None:
    for action in subparsers()[command]._actions:
        assert action.help, action.option_strings


def test_every_config_field_is_a_flag_or_hidden_on_purpose() -> None:
    names = {a.dest for a in subparsers()["serve"]._actions}
    for part in flags.GROUPS:
        cls = EngineConfig.__dataclass_fields__[part].default_factory
        assert {f.name for f in dataclasses.fields(cls)} <= names
    top = {f.name for f in dataclasses.fields(EngineConfig)}
    assert top - set(flags.GROUPS) == {"num_workers"}


def test_every_sampling_field_is_a_flag_or_hidden_on_purpose() -> None:
    names = {f.name for f in dataclasses.fields(SamplingParams)}
    assert names == set(flags.SAMPLING_HELP) | set(flags.SAMPLING_HIDDEN)
