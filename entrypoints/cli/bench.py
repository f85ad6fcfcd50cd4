"""`loraplex bench`: the flags of its measurements."""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loraplex.entrypoints.bench.names import (
    BASE,
    MODELS,
    MODULES,
    POPULARITIES,
    POWER,
    SETTINGS,
)
from loraplex.entrypoints.cli import flags

_MODEL_NOTE = (
    f"--model also takes {', '.join(MODELS)}: random weights at the true shapes. Adapters are "
    "random too, unless --adapter or --adapter-dir names some."
)


def add_bench(
    commands: "argparse._SubParsersAction[flags.FlagParser]",
    add_log_level: Callable[[argparse.ArgumentParser], None],
) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure throughput, latency, serving, and the papers' settings",
        description="Measure an engine through its real processes. " + _MODEL_NOTE,
    )
    kinds = parser.add_subparsers(
        title="measurements", metavar="KIND", required=True, parser_class=flags.FlagParser,
        help="what is measured",
    )  # fmt: skip
    for name, help_text, add_own, command in (
        ("throughput", "a closed trace: base model against n adapters", _throughput_flags,
         _throughput),
        ("latency", "step time by batch and popularity of adapters", _latency_flags, _latency),
        ("serve", "an open loop at a request rate, through ZeroMQ", _serve_flags, _serve),
        ("slora", "S-LoRA's settings: thousands of adapters, saturated or at a rate",
         _slora_flags, _slora),
        ("punica", "Punica's closed batch, by popularity of adapters", _punica_flags, _punica),
        ("tiers", "first tokens of adapters outside the pages, and what loads cost others",
         _tiers_flags, _tiers),
    ):  # fmt: skip
        kind = kinds.add_parser(
            name, usage=f"loraplex bench {name} [FLAGS]", help=help_text, description=_MODEL_NOTE
        )
        group = kind.add_argument_group("measurement")
        add_own(group)
        _output_flags(group)
        add_log_level(kind)
        flags.add_engine_flags(kind, offline=True)
        kind.set_defaults(command=command)


def _throughput_flags(group: Any) -> None:
    _adapter_flags(group, ranks=[8])
    _add(group, "--num-adapters", _list_of(_natural), [0, 1, 32, 128], "N,..",
         "adapter counts, one run each; 0 is the base model alone")  # fmt: skip
    _add(group, "--num-requests", _positive_int, 1000, "N", "requests of a run")
    _trace_flags(group)
    _add(group, "--repeats", _positive_int, 1, "N", "runs of each case; medians are reported")


def _latency_flags(group: Any) -> None:
    _adapter_flags(group, ranks=[8])
    _add(group, "--batches", _list_of(_positive_int), [1, 32, 64, 256], "N,..",
         "requests sent at once")  # fmt: skip
    _add(group, "--popularity", _list_of(_one_of(BASE, *POPULARITIES)), [BASE, "distinct"],
         "NAME,..", f"who answers: {BASE}, {', '.join(POPULARITIES)}")  # fmt: skip
    _add(group, "--prompt-len", _positive_int, 128, "N", "tokens of a prompt")
    _add(group, "--answer-len", _positive_int, 256, "N", "tokens of an answer")
    _add(group, "--repeats", _positive_int, 3, "N", "runs of each case; medians are reported")


def _serve_flags(group: Any) -> None:
    _adapter_flags(group, ranks=[8])
    _add(group, "--rates", _list_of(_positive), [1.0, 2.0, 4.0, 8.0], "X,..",
         "requests a second, one run each")  # fmt: skip
    _add(group, "--duration", _positive, 60.0, "SECONDS", "time over which a run's requests come")
    _add(group, "--cv", _positive, 1.0, "X", "coefficient of variation of the gaps; 1 is Poisson")
    _add(group, "--num-adapters", _natural, 32, "N", "adapters; 0 is the base model alone")
    _trace_flags(group)
    _objective_flag(group)


def _slora_flags(group: Any) -> None:
    settings = (f"{name}: {model}, ranks {','.join(map(str, ranks))}"
                for name, (model, ranks) in SETTINGS.items())  # fmt: skip
    _add(group, "--setting", _one_of(*SETTINGS), "S1", "NAME",
         f"{'; '.join(settings)}; --model and --ranks replace these")  # fmt: skip
    _adapter_flags(group, ranks=None)
    _add(group, "--num-adapters", _list_of(_natural), [5, 100, 1000, 2000], "N,..",
         "adapter counts, one run each; 0 is the base model alone")  # fmt: skip
    _add(group, "--num-registered", _positive_int, None, "N",
         "adapters known to the engine, where more than the trace uses")  # fmt: skip
    _add(group, "--rates", _list_of(_rate), [math.inf], "X,..",
         "requests a second, one run each; inf: all at once (saturated)")  # fmt: skip
    _add(group, "--num-requests", _positive_int, 1200, "N", "requests of a saturated run")
    _add(group, "--duration", _positive, 120.0, "SECONDS", "time over which an open run's come")
    _add(group, "--cv", _positive, 1.0, "X", "coefficient of variation of the gaps; 1 is Poisson")
    _add(group, "--alpha", _positive, 1.0, "X", "exponent of the popularity; 1 is uniform")
    _lengths_flag(group)
    _objective_flag(group)
    _add(group, "--repeats", _positive_int, 1, "N", "runs of each case; medians are reported")


def _punica_flags(group: Any) -> None:
    _adapter_flags(group, ranks=[16], modules=list(MODULES))
    _add(group, "--num-requests", _positive_int, 1024, "N", "requests of a run")
    _add(group, "--batches", _list_of(_positive_int), [32], "N,..",
         "requests that run at one time; an engine is started for each")  # fmt: skip
    _add(group, "--popularity", _list_of(_one_of(BASE, *POPULARITIES)), list(POPULARITIES),
         "NAME,..", f"who answers: {BASE}, {', '.join(POPULARITIES)}")  # fmt: skip
    _add(group, "--repeats", _positive_int, 1, "N", "runs of each case; medians are reported")


def _tiers_flags(group: Any) -> None:
    _adapter_flags(group, ranks=[16], modules=list(MODULES))
    _add(group, "--batch", _positive_int, 64, "N", "requests that decode meanwhile")
    _add(group, "--prompt-len", _positive_int, 128, "N", "tokens of every prompt")
    _add(group, "--answer-len", _positive_int, 1024, "N", "tokens of the answers of the batch")
    _add(group, "--samples", _positive_int, 40, "N", "first tokens timed in each tier")
    _add(group, "--probe-rate", _positive, 8.0, "X", "requests a second that time first tokens")
    _add(group, "--load-rate", _positive, 50.0, "X",
         "loads a second while the others' tokens are timed")  # fmt: skip
    _add(group, "--repeats", _positive_int, 2, "N", "batches in which the others' are timed")


def _objective_flag(group: Any) -> None:
    _add(group, "--ttft-objective", _positive, 6.0, "SECONDS",
         "time to first token that a request should keep")  # fmt: skip


def _trace_flags(group: Any) -> None:
    _add(group, "--popularity", _one_of(POWER, *POPULARITIES), POWER, "NAME",
         f"how requests fall on adapters: {POWER}, {', '.join(POPULARITIES)}")  # fmt: skip
    _add(group, "--alpha", _positive, 1.0, "X", f"exponent of {POWER}; 1 is uniform")
    _lengths_flag(group)


def _lengths_flag(group: Any) -> None:
    _add(group, "--lengths", _bounds, (8, 512), "LOW,HIGH",
         "tokens of prompt and of answer, drawn from [LOW, HIGH)")  # fmt: skip


def _adapter_flags(
    group: Any, *, ranks: list[int] | None, modules: Sequence[str] = ("q", "k", "v", "o")
) -> None:
    """Of random adapters. `ranks` None: the measurement decides."""
    _add(group, "--ranks", _list_of(_positive_int), ranks, "N,..",
         "ranks of random adapters, dealt in turn")  # fmt: skip
    _add(group, "--lora-modules", _modules, list(modules), "NAME,..",
         f"projections of random adapters: all, or some of {','.join(MODULES)}")  # fmt: skip
    _add(group, "--weight-files", _positive_int, 64, "N",
         "random adapters whose weights are written; further ones link to these and differ by "
         "their scale, hence in content, so that thousands fit the disk")  # fmt: skip


def _output_flags(group: Any) -> None:
    _add(group, "--out", Path, None, "PATH",
         "append JSON lines to this file, and draw the .svg of the same name")  # fmt: skip


def _add(
    group: Any, flag: str, kind: Callable[[str], Any], default: Any, metavar: str, text: str
) -> None:
    shown = ",".join(map(str, default)) if isinstance(default, list | tuple) else default
    note = f"{text} (default: {shown})" if default is not None else text
    group.add_argument(flag, type=kind, default=default, metavar=metavar, help=note)


def _list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part.strip()) for part in text.split(",")]


def _number(text: str, kind: Callable[[str], Any], is_allowed: Callable[[Any], bool]) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and is_allowed(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is no number that is allowed here")
    return value


def _natural(text: str) -> int:
    return int(_number(text, int, lambda value: value >= 0))


def _positive_int(text: str) -> int:
    return int(_number(text, int, lambda value: value > 0))


def _positive(text: str) -> float:
    return float(_number(text, float, lambda value: value > 0))


def _rate(text: str) -> float:
    return math.inf if text == "inf" else _positive(text)


def _one_of(*names: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}")
        return text

    return check


def _modules(text: str) -> list[str]:
    names = list(MODULES) if text == "all" else _list_of(_one_of(*MODULES))(text)
    return list(dict.fromkeys(names))


def _bounds(text: str) -> tuple[int, int]:
    values = _list_of(_positive_int)(text)
    if len(values) != 2 or values[0] >= values[1]:
        raise argparse.ArgumentTypeError(f"{text!r} should read LOW,HIGH with LOW below HIGH")
    return values[0], values[1]


def _throughput(args: argparse.Namespace) -> int:
    from loraplex.entrypoints.bench import throughput

    return throughput.run(args)


def _latency(args: argparse.Namespace) -> int:
    from loraplex.entrypoints.bench import latency

    return latency.run(args)


def _serve(args: argparse.Namespace) -> int:
    from loraplex.entrypoints.bench import serve

    return serve.run(args)


def _slora(args: argparse.Namespace) -> int:
    from loraplex.entrypoints.bench import slora

    return slora.run(args)


def _punica(args: argparse.Namespace) -> int:
    from loraplex.entrypoints.bench import punica

    return punica.run(args)


def _tiers(args: argparse.Namespace) -> int:
    from loraplex.entrypoints.bench import tiers

    return tiers.run(args)
