"""The command `loraplex`."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import loraplex
from loraplex.engine.errors import ConfigError, LoraplexError
from loraplex.entrypoints.cli import flags
from loraplex.entrypoints.cli.adapters import add_adapters
from loraplex.entrypoints.cli.bench import add_bench
from loraplex.entrypoints.cli.logging_setup import LEVELS, configure_logging

FAILED, USAGE, INTERRUPTED = 1, 2, 130
"""Exit statuses beside 0: failed while running, wrong flags or configuration, Ctrl-C."""

Command = Callable[[argparse.Namespace], int]


def make_parser() -> argparse.ArgumentParser:
    parser = flags.FlagParser(
        prog="loraplex",
        description="Serve one base model with any number of LoRA adapters, mixed in one batch.",
        epilog="`loraplex COMMAND --help` lists the flags of a command.",
    )
    parser.add_argument("--version", action="version", version=f"loraplex {loraplex.__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=flags.FlagParser
    )
    _add_serve(commands)
    _add_generate(commands)
    add_adapters(commands, _add_log_level)
    add_bench(commands, _add_log_level)
    _add_backends(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = make_parser().parse_args(argv)
    configure_logging(args.log_level)
    command: Command = args.command
    try:
        return command(args)
    except ConfigError as error:
        return _fail(error, USAGE)
    except BrokenPipeError:  # `loraplex ... | head`: nothing more can be said
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (LoraplexError, OSError) as error:
        return _fail(error, FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED


def _fail(error: Exception, status: int) -> int:
    print(f"loraplex: error: {error}", file=sys.stderr)
    return status


def _add_serve(commands: "argparse._SubParsersAction[flags.FlagParser]") -> None:
    parser = commands.add_parser(
        "serve",
        usage="loraplex serve [FLAGS]",
        help="serve clients over ZeroMQ",
        description="Serve clients over ZeroMQ until Ctrl-C or SIGTERM.",
    )
    _add_log_level(parser)
    flags.add_engine_flags(parser, offline=False)
    parser.set_defaults(command=_serve)


def _add_generate(commands: "argparse._SubParsersAction[flags.FlagParser]") -> None:
    parser = commands.add_parser(
        "generate",
        usage="loraplex generate [FLAGS] [PROMPT ...]",
        help="answer prompts and exit",
        description="Answer prompts in one batch, by the base model and by adapters.",
        epilog='example: loraplex generate --adapter pirate=./pirate --compare "Hello there!"',
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="default: stdin's lines")
    parser.add_argument("--file", metavar="PATH", help="a file with one prompt a line; - is stdin")
    parser.add_argument(
        "--use",
        metavar="NAMES",
        help="who answers each prompt, as a,b; `base` is the base model "
        "(default: every adapter, or the base model where there is none)",
    )
    parser.add_argument("--compare", action="store_true", help="let the base model answer too")
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="send prompts through the chat template (default: where the model has one)",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message of every chat")
    parser.add_argument("--json", action="store_true", help="print one JSON object an answer")
    parser.add_argument(
        "--in-process", action="store_true", help="run the engine in this process, to debug it"
    )
    _add_log_level(parser)
    flags.add_sampling_flags(parser)
    flags.add_engine_flags(parser, offline=True)
    parser.set_defaults(command=_generate)


def _add_backends(commands: "argparse._SubParsersAction[flags.FlagParser]") -> None:
    parser = commands.add_parser(
        "backends",
        help="list the kernel backends and which of them work here",
        description="List the kernel backends, which of them work here, and why the others do not.",
    )
    _add_log_level(parser)
    parser.set_defaults(command=_backends)


def _add_log_level(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log-level", choices=LEVELS, help="least severe log record shown (default: warning)"
    )


def _serve(args: argparse.Namespace) -> int:
    from loraplex.entrypoints.cli import serve

    return serve.run(flags.engine_config_of(args))


def _generate(args: argparse.Namespace) -> int:
    from loraplex.entrypoints.cli import generate

    return generate.run(args)


def _backends(args: argparse.Namespace) -> int:
    from loraplex.entrypoints.cli import backends

    return backends.run()


if __name__ == "__main__":
    sys.exit(main())
