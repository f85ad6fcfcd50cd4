"""Runs a parsed command and turns its errors into an exit status."""

import argparse
import os
import sys
from collections.abc import Callable

from loraplex.engine.errors import ConfigError, LoraplexError
from loraplex.entrypoints.cli.logging_setup import LEVELS, configure_logging

FAILED, USAGE, INTERRUPTED = 1, 2, 130
"""Exit statuses besides 0: failed while running, wrong flags or configuration, Ctrl-C."""

Command = Callable[[argparse.Namespace], int]


def add_log_level(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log-level", choices=LEVELS, help="least severe log record shown (default: warning)"
    )


def run_command(args: argparse.Namespace) -> int:
    """Run `args.command`, which the parser has set; returns the exit status."""
    configure_logging(args.log_level)
    command: Command = args.command
    try:
        return command(args)
    except ConfigError as error:
        return _fail(error, USAGE)
    except BrokenPipeError:  # the reader has gone, as in `loraplex ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (LoraplexError, OSError) as error:
        return _fail(error, FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED


def _fail(error: Exception, status: int) -> int:
    print(f"loraplex: error: {error}", file=sys.stderr)
    return status
