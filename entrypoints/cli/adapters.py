"""`loraplex adapters`: list, load, unload and pin the adapters of a running server."""

import argparse
import json
from collections.abc import Iterable, Sequence
from typing import Any

from loraplex.entrypoints.cli import flags
from loraplex.entrypoints.cli.command import add_log_level
from loraplex.entrypoints.cli.connection import add_connection, connect
from loraplex.entrypoints.cli.flag_types import parse_pair

ACTIONS = {
    "list": "list all adapters of the server, or those named",
    "load": "load NAME=PATH, a path on the server's machine; replaces an adapter of that name",
    "unload": "remove adapters by name; requests that use them are finished",
    "pin": "keep adapters in GPU pages",
    "unpin": "allow pinned adapters to be evicted again",
}
HEADER = (
    "name",
    "state",
    "tier",
    "pinned",
    "kind",
    "rank",
    "pages",
    "MB",
    "running",
    "waiting",
    "used",
)


def add_adapters(commands: "argparse._SubParsersAction[flags.FlagParser]") -> None:
    summary = "list, load, unload and pin the adapters of a running server"
    parser = commands.add_parser("adapters", help=summary, description=_sentence(summary))
    actions = parser.add_subparsers(
        title="actions",
        metavar="ACTION",
        required=True,
        help="one of these",
        parser_class=flags.FlagParser,
    )
    for name, text in ACTIONS.items():
        action = actions.add_parser(name, help=text, description=_sentence(text))
        is_load = name == "load"
        action.add_argument(
            "names",
            nargs="*" if name == "list" else "+",
            type=parse_pair if is_load else str,
            metavar="NAME=PATH" if is_load else "NAME",
            help="PATH may be relative to the server's --adapter-root"
            if is_load
            else "names of adapters",
        )
        if is_load:
            action.add_argument(
                "--lazy", action="store_true", help="read the files when a request first needs them"
            )
        add_connection(action, json_help="print one JSON object per adapter")
        add_log_level(action)
        action.set_defaults(command=run, action=name)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def run(args: argparse.Namespace) -> int:
    """Run one action on the server.

    The names are handled in order. An error ends the command; earlier names keep their effect.
    """
    with connect(args) as client:
        if args.action == "unload":
            for name in args.names:
                client.unload_adapter(name)
                if not args.json:
                    print(f"unloaded {name}", flush=True)
            return 0
        if args.action == "load":
            found = [client.load_adapter(name, path, lazy=args.lazy) for name, path in args.names]
        elif args.action == "list":
            found = [a for name in args.names or [""] for a in client.list_adapters(name)]
        else:
            act = client.pin_adapter if args.action == "pin" else client.unpin_adapter
            found = [act(name) for name in args.names]
    for line in map(json.dumps, found) if args.json else table(found):
        print(line)
    return 0


def _kind(adapter: dict[str, Any]) -> str:
    is_activated = bool(adapter.get("invocation_tokens"))
    return f"{adapter['kind']}, activated" if is_activated else adapter["kind"]


def table(adapters: Iterable[dict[str, Any]]) -> list[str]:
    """Lines of the table: a header, then one adapter a line, with its error below."""
    rows: list[Sequence[str]] = [HEADER]
    errors = [""]
    for adapter in adapters:
        used = adapter["seconds_since_use"]
        rows.append((
            adapter["name"], adapter["state"], adapter["tier"], "yes" if adapter["pinned"] else "",
            _kind(adapter), str(adapter["max_rank"]), str(adapter["num_pages"]),
            f"{adapter['num_bytes'] / 1e6:.1f}", str(adapter["num_running"]),
            str(adapter["num_waiting"]), "never" if used is None else f"{used:.0f} s ago",
        ))  # fmt: skip
        notes = [adapter["error"]] if adapter["error"] else []
        notes += [f"warning: {text}" for text in adapter.get("warnings", [])]
        errors.append("".join(f"\n  {note}" for note in notes))
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return [line + error for line, error in zip(lines, errors, strict=True)]
