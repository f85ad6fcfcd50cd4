"""`loraplex bench`: the flags of its measurements."""

import argparse
import math
from typing import Any

from loraplex.engine.config import EngineConfig
from loraplex.entrypoints.bench.names import BASE, MODULES, POPULARITIES, SETTINGS
from loraplex.entrypoints.cli import flags
from loraplex.entrypoints.cli.bench_flags import (
    MODEL_NOTE,
    adapter_flags,
    add_flag,
    cv_flag,
    fill_bench_parser,
    lengths_flag,
    objective_flag,
    repeats_flag,
    trace_flags,
)
from loraplex.entrypoints.cli.flag_types import (
    list_of,
    natural,
    one_of,
    positive,
    positive_int,
    rate,
)


def add_bench(commands: "argparse._SubParsersAction[flags.FlagParser]") -> None:
    parser = commands.add_parser(
        "bench",
        help="measure throughput, latency and serving",
        description="Measure an engine through its real processes. " + MODEL_NOTE,
    )
    kinds = parser.add_subparsers(
        title="measurements", metavar="KIND", required=True, parser_class=flags.FlagParser,
        help="what is measured",
    )  # fmt: skip
    for name, text, add_own, run in (
        ("throughput", "a closed trace, by the base model and by n adapters", _throughput_flags,
         _throughput),
        ("latency", "time of a step, by batch size and popularity of adapters", _latency_flags,
         _latency),
        ("serve", "requests that arrive at a given rate, through ZeroMQ", _serve_flags, _serve),
        ("slora", "S-LoRA's settings: thousands of adapters, saturated or at a rate",
         _slora_flags, _slora),
        ("punica", "Punica's closed batch, by popularity of adapters", _punica_flags, _punica),
        ("tiers", "first tokens of adapters outside the pages, and what loads cost others",
         _tiers_flags, _tiers),
    ):  # fmt: skip
        kind = kinds.add_parser(
            name, usage=f"loraplex bench {name} [FLAGS]", help=text, description=MODEL_NOTE
        )
        fill_bench_parser(kind, add_own, run)


def _throughput_flags(group: Any) -> None:
    adapter_flags(group, ranks=[8])
    add_flag(group, "--num-adapters", list_of(natural), [0, 1, 32, 128], "N,..",
             "numbers of adapters, one run each; 0 is the base model alone")  # fmt: skip
    add_flag(group, "--num-requests", positive_int, 1000, "N", "requests of a run")
    trace_flags(group)
    repeats_flag(group, 1)


def _latency_flags(group: Any) -> None:
    adapter_flags(group, ranks=[8])
    add_flag(group, "--batches", list_of(positive_int), [1, 32, 64, 256], "N,..",
             "numbers of requests sent at once, one run each")  # fmt: skip
    add_flag(group, "--popularity", list_of(one_of(BASE, *POPULARITIES)), [BASE, "distinct"],
             "NAME,..", f"who answers: {BASE}, {', '.join(POPULARITIES)}")  # fmt: skip
    add_flag(group, "--prompt-len", positive_int, 128, "N", "tokens of a prompt")
    add_flag(group, "--answer-len", positive_int, 256, "N", "tokens of an answer")
    repeats_flag(group, 3)


def _serve_flags(group: Any) -> None:
    adapter_flags(group, ranks=[8])
    add_flag(group, "--rates", list_of(positive), [1.0, 2.0, 4.0, 8.0], "X,..",
             "requests a second, one run each")  # fmt: skip
    add_flag(group, "--duration", positive, 60.0, "SECONDS", "time over which requests arrive")
    cv_flag(group)
    add_flag(group, "--num-adapters", natural, 32, "N", "adapters; 0 is the base model alone")
    trace_flags(group)
    objective_flag(group)


def _slora_flags(group: Any) -> None:
    settings = (f"{name}: {model}, ranks {','.join(map(str, ranks))}"
                for name, (model, ranks) in SETTINGS.items())  # fmt: skip
    add_flag(group, "--setting", one_of(*SETTINGS), "S1", "NAME",
             f"{'; '.join(settings)}; --model and --ranks replace these")  # fmt: skip
    adapter_flags(group, ranks=None)
    add_flag(group, "--num-adapters", list_of(natural), [5, 100, 1000, 2000], "N,..",
             "numbers of adapters, one run each; 0 is the base model alone")  # fmt: skip
    add_flag(group, "--num-registered", positive_int, None, "N",
             "adapters registered with the engine, if more than the trace uses")  # fmt: skip
    add_flag(group, "--rates", list_of(rate), [math.inf], "X,..",
             "requests a second, one run each; inf sends all at once (saturated)")  # fmt: skip
    add_flag(group, "--num-requests", positive_int, 1200, "N", "requests of a saturated run")
    add_flag(group, "--duration", positive, 120.0, "SECONDS",
             "time over which the requests of a run at a rate arrive")  # fmt: skip
    cv_flag(group)
    add_flag(group, "--alpha", positive, 1.0, "X", "exponent of the popularity; 1 is uniform")
    lengths_flag(group)
    objective_flag(group)
    repeats_flag(group, 1)


def _punica_flags(group: Any) -> None:
    adapter_flags(group, ranks=[16], modules=list(MODULES))
    add_flag(group, "--num-requests", positive_int, 1024, "N", "requests of a run")
    add_flag(group, "--batches", list_of(positive_int), [32], "N,..",
             "requests that run at one time; each starts an engine")  # fmt: skip
    add_flag(group, "--popularity", list_of(one_of(BASE, *POPULARITIES)), list(POPULARITIES),
             "NAME,..", f"who answers: {BASE}, {', '.join(POPULARITIES)}")  # fmt: skip
    repeats_flag(group, 1)


def _tiers_flags(group: Any) -> None:
    adapter_flags(group, ranks=[16], modules=list(MODULES))
    add_flag(group, "--batch", positive_int, 64, "N", "requests that decode in the background")
    add_flag(group, "--prompt-len", positive_int, 128, "N", "tokens of every prompt")
    add_flag(group, "--answer-len", positive_int, 1024, "N", "tokens of a background answer")
    add_flag(group, "--samples", positive_int, 40, "N", "first tokens timed in each tier")
    add_flag(group, "--probe-rate", positive, 8.0, "X",
             "short requests a second while first tokens are timed")  # fmt: skip
    add_flag(group, "--load-rate", positive, 50.0, "X",
             "loads a second while background tokens are timed")  # fmt: skip
    add_flag(group, "--repeats", positive_int, 2, "N",
             "background batches timed in each case")  # fmt: skip


def _throughput(args: argparse.Namespace, config: EngineConfig) -> int:
    from loraplex.entrypoints.bench import throughput

    return throughput.run(args, config)


def _latency(args: argparse.Namespace, config: EngineConfig) -> int:
    from loraplex.entrypoints.bench import latency

    return latency.run(args, config)


def _serve(args: argparse.Namespace, config: EngineConfig) -> int:
    from loraplex.entrypoints.bench import serve

    return serve.run(args, config)


def _slora(args: argparse.Namespace, config: EngineConfig) -> int:
    from loraplex.entrypoints.bench import slora

    return slora.run(args, config)


def _punica(args: argparse.Namespace, config: EngineConfig) -> int:
    from loraplex.entrypoints.bench import punica

    return punica.run(args, config)


def _tiers(args: argparse.Namespace, config: EngineConfig) -> int:
    from loraplex.entrypoints.bench import tiers

    return tiers.run(args, config)
