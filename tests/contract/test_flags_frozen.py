"""The flags are part of the interface: a new or lost one shows here, for a reviewer to see."""

import argparse
import dataclasses

import pytest

from loraplex.engine.config import EngineConfig
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.entrypoints.cli import flags
from loraplex.entrypoints.cli import main as cli

MODEL = [
    "--chat-template", "--device", "--dtype", "--load-format", "--max-model-len", "--model",
    "--no-skip-tokenizer-init", "--quantization", "--seed", "--skip-tokenizer-init", "--tokenizer",
]  # fmt: skip
ENGINE = [
    *MODEL, "--adapter", "--adapter-cache-bytes", "--adapter-cache-dir", "--adapter-dir",
    "--adapter-dtype",
    "--adapter-host-bytes", "--adapter-mix", "--adapter-store", "--adapter-store-max-bytes",
    "--adapter-store-timeout-s", "--adapter-store-ttl-s",
    "--attention-backend",
    "--block-tokens", "--config", "--enable-lora", "--enable-prefix-caching", "--enforce-eager",
    "--fair-share-by", "--fair-share-weight", "--fused-backend", "--collective-backend",
    "--gpu-memory-utilization", "--graph-bytes", "--graph-seconds", "--kv-cache-dtype",
    "--linear-backend", "--lora-backend",
    "--max-adapter-slots", "--max-adapters-per-batch", "--max-lora-rank", "--max-loras",
    "--max-num-batched-tokens", "--max-num-seqs", "--max-queue-len", "--max-steps-in-flight",
    "--max-token-rows",
    "--max-wait-s", "--no-enable-prefix-caching", "--no-enforce-eager",
    "--num-pages", "--policy", "--pool-bytes", "--profile-dir",
    "--profile-every", "--profile-steps", "--speculative-config", "--tensor-parallel-size",
    "--ttft-slo-s",
    "--watchdog-timeout",
]  # fmt: skip
SAMPLING = [
    "--frequency-penalty", "--ignore-eos", "--include-stop-str-in-output", "--logit-bias",
    "--logprobs", "--max-tokens", "--min-p", "--min-tokens", "--n", "--no-ignore-eos",
    "--no-include-stop-str-in-output", "--no-skip-special-tokens", "--presence-penalty",
    "--prompt-logprobs", "--repetition-penalty", "--skip-special-tokens", "--stop",
    "--stop-token-ids", "--temperature", "--top-k", "--top-p",
]  # fmt: skip
CLIENT = [
    "--client-secret-key-file", "--endpoint", "--json", "--log-level", "--server-public-key",
    "--timeout-s",
]  # fmt: skip
BENCH = [*ENGINE, "--log-level", "--lora-modules", "--out", "--plot", "--ranks", "--weight-files"]
TRACE = ["--alpha", "--lengths", "--popularity"]
SERVED = [
    *ENGINE, "--adapter-root", "--allow-adapter-upload", "--api-keys", "--client-public-keys-dir",
    "--endpoint", "--insecure", "--max-adapters-per-tenant", "--max-client-backlog",
    "--max-message-bytes", "--max-requests-per-client", "--no-allow-adapter-upload",
    "--no-insecure", "--server-secret-key-file", "--log-level",
    "--drain-grace", "--drain-timeout", "--request-timeout", "--log-format",
    "--kv-events-config",
]  # fmt: skip
FROZEN = {
    "serve": [*SERVED, "--http", "--num-frontends", "--served-model-name"],
    "cluster": [
        *SERVED, "--engines", "--http", "--max-engines", "--min-engines",
        "--num-frontends", "--placement", "--ray-address", "--served-model-name",
    ],
    "cluster status": CLIENT,
    "generate": [
        *ENGINE, *SAMPLING, "--chat", "--compare", "--file", "--in-process", "--json",
        "--log-level", "--no-chat", "--system", "--use",
    ],
    "adapters": [],
    "top": [*CLIENT, "--api-key-file"],
    "adapters list": CLIENT,
    "adapters load": [*CLIENT, "--lazy"],
    "adapters unload": CLIENT,
    "adapters pin": CLIENT,
    "adapters unpin": CLIENT,
    "keys": [],
    "keys new": ["--log-level", "--tenant"],
    "bench": [],
    "bench throughput": [*BENCH, *TRACE, "--num-adapters", "--num-requests", "--repeats"],
    "bench latency": [
        *BENCH, "--answer-len", "--batches", "--popularity", "--prompt-len", "--repeats",
    ],
    "bench serve": [
        *BENCH, *TRACE, "--cv", "--duration", "--num-adapters", "--rates", "--ttft-objective",
    ],
    "bench cluster": [
        *BENCH, *TRACE, "--endpoint", "--engines", "--kill", "--num-adapters", "--num-requests",
        "--placement",
    ],
    "backends": ["--log-level"],
    "completion": ["--log-level"],
}  # fmt: skip


def subparsers() -> dict[str, argparse.ArgumentParser]:
    """Every command and, as "bench throughput", every command below one."""
    found = commands_of(cli.make_parser())
    for name, parser in list(found.items()):
        found |= {f"{name} {below}": value for below, value in commands_of(parser).items()}
    return found


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    actions = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(actions[0].choices) if actions else {}


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
    assert top == set(flags.GROUPS)


def test_every_sampling_field_is_a_flag_or_hidden_on_purpose() -> None:
    names = {f.name for f in dataclasses.fields(SamplingParams)}
    assert names == set(flags.SAMPLING_HELP) | set(flags.SAMPLING_HIDDEN)
