"""`loraplex cluster status`: the engines of a running cluster, their load and what was moved."""

import argparse
import json
from typing import Any

from loraplex.engine.errors import ConfigError
from loraplex.entrypoints.cli import flags
from loraplex.entrypoints.cli.command import add_log_level
from loraplex.entrypoints.cli.connection import add_connection, connect

COLUMNS = {
    "state": "state",
    "running": "running",
    "waiting": "waiting",
    "seats": "seats",
    "free_pages": "free pages",
    "pages": "pages",
    "adapters": "adapters",
    "loading": "loading",
    "steps_per_second": "steps/s",
}
"""Titles by the key of an engine's row."""


def add_status(actions: "argparse._SubParsersAction[flags.FlagParser]") -> None:
    """Adds the command."""
    text = "Show the engines of a running cluster, their load, and the requests that were moved."
    parser = actions.add_parser("status", help=text[0].lower() + text[1:-1], description=text)
    add_connection(parser, json_help="print one JSON object")
    add_log_level(parser)
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> int:
    """Prints the status; returns 0.

    Raises:
        ConfigError: a single engine answers at the endpoint.
    """
    with connect(args) as client:
        status = client.stats().get("router")
    if status is None:
        raise ConfigError(
            f"{args.endpoint} is a single engine, not a cluster: give --endpoint of a cluster"
        )
    print(json.dumps(status) if args.json else "\n".join(lines(status)))
    return 0


def lines(status: dict[str, Any]) -> list[str]:
    """Returns the table of the engines, and a line about the router."""
    rows = [("engine", *COLUMNS.values())]
    for name, engine in sorted(status["engines"].items()):
        rows.append((name, *(str(engine.get(key, "")) for key in COLUMNS)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    router = (
        f"placement {status['placement']}; {status['unfinished']} requests unfinished, "
        f"{status['waiting']} of them without an engine; {status['moves']} moved, "
        f"{status['recomputed_tokens']:,} tokens computed again; "
        f"{status['lost_engines']} engines lost"
    )
    scale = status["scale"]
    if not scale:
        return [*table, router]
    decisions = (
        f"{scale['min_engines']} to {scale['max_engines']} engines: {scale['started']} started, "
        f"{scale['released']} released, {scale['failed']} given up"
    )
    return [*table, router, decisions + (f"; last: {scale['last']}" if scale["last"] else "")]
