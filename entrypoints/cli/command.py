"""Runs a parsed command and turns its errors into an exit status."""

import argparse
import os
import sys
from collections.abc import Callable

from loraplex.engine.errors import ConfigError, LoraplexError
from loraplex.engine.ipc.json_formatter import json_line
from loraplex.engine.ipc.log_setup import LOG_FORMATS, writes_json
from loraplex.entrypoints.cli.output.logging_setup import LEVELS, configure_logging

FAILED, USAGE, INTERRUPTED = 1, 2, 130
"""Exit statuses besides 0: failed while running, wrong flags or configuration, Ctrl-C."""

Command = Callable[[argparse.Namespace], int]


def add_log_level(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log-level", choices=LEVELS, help="least severe log record shown (default: warning)"
    )


def add_log_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log-format",
        choices=LOG_FORMATS,
        help="form of log records and of what the server says; json: an object a line "
        "(default: text)",
    )


def run_command(args: argparse.Namespace) -> int:
    """Run `args.command`, which the parser has set; returns the exit status."""
    configure_logging(args.log_level, getattr(args, "log_format", None))
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


def print_failure(reason: object) -> None:
    """Say on standard error why the command fails."""
    text = f"loraplex: error: {reason}"
    if writes_json():
        text = json_line("", "error", event="failed", message=str(reason))
    print(text, file=sys.stderr, flush=True)


def _fail(error: Exception, status: int) -> int:
    print_failure(error)
    return status
