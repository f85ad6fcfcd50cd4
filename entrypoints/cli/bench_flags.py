"""Flags that benchmarks share. The scripts under benchmarks/papers use them too."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loraplex.engine.config import EngineConfig
from loraplex.entrypoints.bench.names import MODELS, MODULES, POPULARITIES, POWER
from loraplex.entrypoints.cli import flags
from loraplex.entrypoints.cli.command import add_log_level
from loraplex.entrypoints.cli.flag_types import bounds, list_of, one_of, positive, positive_int

MODEL_NOTE = (
    f"--model also takes {', '.join(MODELS)}, which have random weights of the true shapes. "
    "Adapters are random too, unless --adapter or --adapter-dir names some."
)

AddFlags = Callable[[Any], None]
Run = Callable[[argparse.Namespace, EngineConfig], int]


def fill_bench_parser(parser: argparse.ArgumentParser, add_own: AddFlags, run: Run) -> None:
    """Give a benchmark its flags: its own, those of the output, and those of the engine.

    Args:
        add_own: adds the benchmark's own flags to an argument group.
        run: runs the benchmark with the configuration of the engine that the flags describe.
    """
    group = parser.add_argument_group("measurement")
    add_own(group)
    _output_flags(group)
    add_log_level(parser)
    flags.add_engine_flags(parser, offline=True)
    parser.set_defaults(command=lambda args: run(args, flags.engine_config_of(args)))


def make_script_parser(description: str, add_own: AddFlags, run: Run) -> argparse.ArgumentParser:
    """Make the parser of a benchmark that is a script."""
    parser = flags.FlagParser(usage="%(prog)s [FLAGS]", description=description, epilog=MODEL_NOTE)
    fill_bench_parser(parser, add_own, run)
    return parser


def add_flag(
    group: Any, flag: str, kind: Callable[[str], Any], default: Any, metavar: str, text: str
) -> None:
    """Add a flag whose help shows its default."""
    shown = ",".join(map(str, default)) if isinstance(default, list | tuple) else default
    note = f"{text} (default: {shown})" if default is not None else text
    group.add_argument(flag, type=kind, default=default, metavar=metavar, help=note)


def adapter_flags(
    group: Any, *, ranks: list[int] | None, modules: Sequence[str] = ("q", "k", "v", "o")
) -> None:
    """Add the flags of random adapters. Without `ranks` the benchmark chooses the default."""
    add_flag(group, "--ranks", list_of(positive_int), ranks, "N,..",
             "ranks of random adapters, dealt in turn")  # fmt: skip
    add_flag(group, "--lora-modules", _modules, list(modules), "NAME,..",
             f"projections of random adapters: all, or some of {','.join(MODULES)}")  # fmt: skip
    add_flag(group, "--weight-files", positive_int, 64, "N",
             "number of random adapters whose weights are written; further adapters link to these "
             "files and have another scale, hence another content hash")  # fmt: skip


def trace_flags(group: Any) -> None:
    add_flag(group, "--popularity", one_of(POWER, *POPULARITIES), POWER, "NAME",
             f"how requests choose adapters: {POWER}, {', '.join(POPULARITIES)}")  # fmt: skip
    add_flag(group, "--alpha", positive, 1.0, "X", f"exponent of {POWER}; 1 is uniform")
    lengths_flag(group)


def lengths_flag(group: Any) -> None:
    add_flag(group, "--lengths", bounds, (8, 512), "LOW,HIGH",
             "tokens of a prompt and of an answer, drawn from [LOW, HIGH)")  # fmt: skip


def objective_flag(group: Any) -> None:
    add_flag(group, "--ttft-objective", positive, 6.0, "SECONDS",
             "longest time to first token that counts as in time")  # fmt: skip


def cv_flag(group: Any) -> None:
    add_flag(group, "--cv", positive, 1.0, "X",
             "coefficient of variation of the gaps between requests; 1 is Poisson")  # fmt: skip


def repeats_flag(group: Any, default: int) -> None:
    add_flag(group, "--repeats", positive_int, default, "N",
             "runs of each case; the medians are reported")  # fmt: skip


def _output_flags(group: Any) -> None:
    add_flag(group, "--out", Path, None, "PATH", "append JSON lines to this file")
    add_flag(group, "--plot", Path, None, "PATH",
             "plot the results to this .svg or .png file; needs matplotlib")  # fmt: skip


def _modules(text: str) -> list[str]:
    names = list(MODULES) if text == "all" else list_of(one_of(*MODULES))(text)
    return list(dict.fromkeys(names))
