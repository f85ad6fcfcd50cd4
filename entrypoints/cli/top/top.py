"""`loraplex top`: the live view of a running server in the terminal."""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from loraplex.engine.errors import ConfigError
from loraplex.entrypoints.cli import flags
from loraplex.entrypoints.cli.command import add_log_level
from loraplex.entrypoints.cli.connection import add_connection, connect

if TYPE_CHECKING:
    from loraplex.entrypoints.cli.top.live_source import LiveSource


def add_top(commands: "argparse._SubParsersAction[flags.FlagParser]") -> None:
    """Adds the command."""
    text = "Show the load, the page pool and the adapters of a running server, live."
    parser = commands.add_parser("top", help=text[0].lower() + text[1:-1], description=text)
    add_connection(
        parser,
        json_help="print a JSON object twice a second instead",
        endpoint_help="the server's address, of ZeroMQ or http:// (%(default)s)",
    )
    parser.add_argument(
        "--api-key-file", metavar="PATH",
        help="file with the operator's API key, for an http:// address of a server with keys",
    )  # fmt: skip
    add_log_level(parser)
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> int:
    """Shows views until the user quits; returns 0.

    Raises:
        ConfigError: the extra is not installed, or the key file does not go with the address.
        EngineDeadError: no server answers.
    """
    if not args.json and find_spec("textual") is None:
        raise ConfigError("loraplex top needs textual: pip install 'loraplex[top]'")
    with _source(args) as source:
        if args.json:
            for view in source.views():
                print(json.dumps(view), flush=True)
            return 0
        from loraplex.entrypoints.cli.top.top_app import TopApp

        app = TopApp(source)
        app.run()
        if app.error is not None:
            raise app.error
        return 0


def _source(args: argparse.Namespace) -> "LiveSource":
    from loraplex.entrypoints.cli.top.live_source import HttpSource, ZmqSource

    if not args.endpoint.startswith(("http://", "https://")):
        if args.api_key_file:
            raise ConfigError("--api-key-file is for an http:// address; ZeroMQ has key files")
        return ZmqSource(connect(args))
    key = Path(args.api_key_file).read_text().strip() if args.api_key_file else ""
    return HttpSource(args.endpoint, key=key, timeout_s=args.timeout_s)
