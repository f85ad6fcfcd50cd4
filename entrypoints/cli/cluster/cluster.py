"""`loraplex cluster`: run several engines behind one endpoint."""

import argparse

from loraplex.engine.errors import ConfigError
from loraplex.engine.ipc.log_setup import writes_json
from loraplex.entrypoints.cli import flags
from loraplex.entrypoints.cli.cluster.cluster_status import add_status
from loraplex.entrypoints.cli.command import add_log_format, add_log_level, print_failure
from loraplex.scheduler.placement.placement import POLICIES


def add_cluster(commands: "argparse._SubParsersAction[flags.FlagParser]") -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "cluster",
        usage="loraplex cluster (--engines N | --min-engines A --max-engines B) [FLAGS]\n"
        "       loraplex cluster status [FLAGS]",
        help="serve clients by several engines, of this machine or of a Ray cluster",
        description="Serve clients over ZeroMQ, and HTTP with --http, by several engines behind "
        "one endpoint, until Ctrl-C or SIGTERM. Each engine has --tensor-parallel-size GPUs of its "
        "own. If one dies, its requests go on elsewhere.",
    )
    actions = parser.add_subparsers(
        title="actions", metavar="ACTION", required=False, parser_class=flags.FlagParser,
        help="without one, start a cluster",
    )  # fmt: skip
    add_status(actions)
    parser.add_argument("--engines", type=int, metavar="N", help="engines, always as many")
    parser.add_argument(
        "--min-engines", type=int, metavar="A", help="engines to start, and the fewest"
    )
    parser.add_argument(
        "--max-engines",
        type=int,
        metavar="B",
        help="the most engines: more start under load, and idle ones are released",
    )
    parser.add_argument(
        "--placement",
        choices=POLICIES,
        default="affinity",
        help="which engine gets a request: affinity (few engines for each adapter, then the "
        "soonest first token), consolidate (the fullest that keeps --ttft-slo-s), least_loaded, "
        "random (default: %(default)s)",
    )
    parser.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        default="",
        help="a Ray cluster for the engines; local: start Ray on this machine; none: child "
        "processes (default: local if Ray is installed, else none)",
    )
    add_log_level(parser)
    add_log_format(parser)
    flags.add_engine_flags(parser, offline=False)
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; returns 0 then, or 1 if the router died for good.

    Raises:
        ConfigError: the number of engines is missing, or the cluster cannot start as configured.
    """
    from loraplex.engine.adapters.paths import adapters_at_start
    from loraplex.engine.cluster.engine_cluster import EngineCluster
    from loraplex.entrypoints.cli.output.server_output import ServerOutput
    from loraplex.entrypoints.cli.serve import describe

    num_engines, max_engines = engines_of(args)
    config = flags.engine_config_of(args)
    num_adapters = len(adapters_at_start(config.adapter))
    output = ServerOutput(as_json=writes_json())

    def announce(cluster: EngineCluster) -> None:
        engines = cluster.engines
        info = next(iter(engines.values())).info
        lines = describe(cluster.endpoint, config, info, num_adapters)
        most = f" to {max_engines}" if max_engines > num_engines else ""
        where = f"{cluster.describe_launcher()}, placement {args.placement}"
        if cluster.http_endpoint:
            lines.insert(1, f"  {'http':<9} http://{cluster.http_endpoint}/v1")
        lines.insert(1, f"  {'engines':<9} {len(engines)}{most}: {where}; each has:")
        output.ready(lines, endpoint=cluster.endpoint, http=cluster.http_endpoint)

    cluster = EngineCluster(
        config,
        num_engines=num_engines,
        max_engines=max_engines,
        placement=args.placement,
        ray_address=args.ray_address,
        on_progress=output.progress,
    )
    try:
        status = cluster.serve(on_ready=announce)
    finally:
        output.close()
    if cluster.dead_reason:
        print_failure(cluster.dead_reason)
    return status


def engines_of(args: argparse.Namespace) -> tuple[int, int]:
    """Returns the fewest and the most engines.

    Raises ConfigError unless there is --engines, or both --min-engines and --max-engines.
    """
    bounds = (args.min_engines, args.max_engines)
    if args.engines is not None and bounds == (None, None):
        return args.engines, args.engines
    if args.engines is not None or None in bounds:
        raise ConfigError("give --engines N, or --min-engines A and --max-engines B")
    return args.min_engines, args.max_engines
