"""`loraplex bench`: the flags of its measurements."""

import argparse
from typing import Any

from loraplex.engine.config import EngineConfig
from loraplex.entrypoints.bench.names import BASE, POPULARITIES
from loraplex.entrypoints.cli import flags
from loraplex.entrypoints.cli.bench_flags import (
    MODEL_NOTE,
    adapter_flags,
    add_flag,
    cv_flag,
    fill_bench_parser,
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
)
from loraplex.scheduler.placement.placement import POLICIES


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
        ("cluster", "engines behind one router, beside one of them alone", _cluster_flags,
         _cluster),
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


def _cluster_flags(group: Any) -> None:
    adapter_flags(group, ranks=[8])
    add_flag(group, "--engines", positive_int, None, "N",
             "engines to start, child processes with GPUs of their own (default: 2)")  # fmt: skip
    add_flag(group, "--placement", one_of(*POLICIES), "affinity", "NAME",
             f"which engine gets a request: {', '.join(POLICIES)}")  # fmt: skip
    add_flag(group, "--endpoint", str, None, "URL",
             "measure the running cluster at this address instead, with its adapters")  # fmt: skip
    group.add_argument(
        "--kill", action="store_true",
        help="at last kill an engine under load: do all streams end complete, after what pause?",
    )  # fmt: skip
    add_flag(group, "--num-adapters", natural, 200, "N", "adapters; 0 is the base model alone")
    add_flag(group, "--num-requests", positive_int, 500, "N", "requests for each engine")
    trace_flags(group)


def _throughput(args: argparse.Namespace, config: EngineConfig) -> int:
    from loraplex.entrypoints.bench import throughput

    return throughput.run(args, config)


def _latency(args: argparse.Namespace, config: EngineConfig) -> int:
    from loraplex.entrypoints.bench import latency

    return latency.run(args, config)


def _serve(args: argparse.Namespace, config: EngineConfig) -> int:
    from loraplex.entrypoints.bench import serve

    return serve.run(args, config)


def _cluster(args: argparse.Namespace, config: EngineConfig) -> int:
    from loraplex.entrypoints.bench.cluster import cluster_bench

    return cluster_bench.run(args, config)
