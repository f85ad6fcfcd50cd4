"""Connects the commands that ask a running server."""

import argparse
import socket
from typing import TYPE_CHECKING

from loraplex.engine.config import ServerConfig
from loraplex.engine.errors import EngineDeadError

if TYPE_CHECKING:
    from loraplex.entrypoints.client.sync_client import Client

PROBE_TIMEOUT_S = 3.0


def add_connection(
    parser: argparse.ArgumentParser,
    *,
    json_help: str,
    endpoint_help: str = "the server's address (%(default)s)",
) -> None:
    """Adds the flags that say which server to ask, and as whom."""
    parser.add_argument("--json", action="store_true", help=json_help)
    parser.add_argument("--endpoint", default=ServerConfig().endpoint, help=endpoint_help)
    parser.add_argument(
        "--server-public-key", metavar="KEY",
        help="the server's CurveZMQ key, 40 characters or a certificate file; turns encryption on",
    )  # fmt: skip
    parser.add_argument(
        "--client-secret-key-file", metavar="PATH",
        help="this client's certificate, for a server that admits known clients only",
    )  # fmt: skip
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=30.0,
        metavar="X",
        help="longest wait for an answer (%(default)s)",
    )


def connect(args: argparse.Namespace) -> "Client":
    """Returns a client of the server that the flags name.

    Raises EngineDeadError if none answers.
    """
    from loraplex.entrypoints.client.sync_client import Client

    check_listening(args.endpoint)
    return Client(
        args.endpoint,
        server_public_key=args.server_public_key,
        client_secret_key_file=args.client_secret_key_file,
        timeout_s=args.timeout_s,
    )


def check_listening(endpoint: str) -> None:
    """Raises EngineDeadError if nothing listens at a tcp or ipc address; does nothing for others.

    ZeroMQ itself would wait for a server to come.
    """
    kind, _, rest = endpoint.partition("://")
    host, _, port = rest.rpartition(":")
    try:
        if kind == "ipc" and not rest.startswith("@"):
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(PROBE_TIMEOUT_S)
                probe.connect(rest)
        elif kind == "tcp" and port.isdigit():
            address = (host.strip("[]"), int(port))
            socket.create_connection(address, PROBE_TIMEOUT_S).close()
    except OSError as error:
        raise EngineDeadError(
            f"no server answers at {endpoint} ({error}): start one with `loraplex serve`, or give "
            "its address with --endpoint"
        ) from None
