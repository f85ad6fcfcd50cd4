"""The command `loraplex`."""

import argparse
import sys
from collections.abc import Sequence

import loraplex
from loraplex.entrypoints.cli import flags
from loraplex.entrypoints.cli.adapters import add_adapters
from loraplex.entrypoints.cli.bench import add_bench
from loraplex.entrypoints.cli.cluster.cluster import add_cluster
from loraplex.entrypoints.cli.command import add_log_format, add_log_level, run_command
from loraplex.entrypoints.cli.completion import add_completion
from loraplex.entrypoints.cli.keys import add_keys
from loraplex.entrypoints.cli.top.top import add_top


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
    add_cluster(commands)
    _add_generate(commands)
    add_adapters(commands)
    add_keys(commands)
    add_top(commands)
    add_bench(commands)
    _add_backends(commands)
    add_completion(commands, parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    return run_command(make_parser().parse_args(argv))


def _add_serve(commands: "argparse._SubParsersAction[flags.FlagParser]") -> None:
    parser = commands.add_parser(
        "serve",
        usage="loraplex serve [MODEL] [FLAGS]",
        help="serve clients over ZeroMQ",
        description="Serve clients over ZeroMQ until Ctrl-C or SIGTERM.",
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", default=argparse.SUPPRESS, help="the same as --model"
    )
    add_log_level(parser)
    add_log_format(parser)
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
    parser.add_argument(
        "prompts",
        nargs="*",
        metavar="PROMPT",
        help="a prompt (default: the lines of standard input)",
    )
    parser.add_argument("--file", metavar="PATH", help="a file with one prompt a line; - is stdin")
    parser.add_argument(
        "--use",
        metavar="NAMES",
        help="adapters that answer each prompt, as a,b; `base` is the base model "
        "(default: every adapter, or the base model if there is none)",
    )
    parser.add_argument("--compare", action="store_true", help="let the base model answer too")
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="apply the chat template to prompts (default: yes if the model has one)",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message of every chat")
    parser.add_argument("--json", action="store_true", help="print one JSON object per answer")
    parser.add_argument(
        "--in-process", action="store_true", help="run the engine in this process, for debugging"
    )
    add_log_level(parser)
    flags.add_sampling_flags(parser)
    flags.add_engine_flags(parser, offline=True)
    parser.set_defaults(command=_generate)


def _add_backends(commands: "argparse._SubParsersAction[flags.FlagParser]") -> None:
    parser = commands.add_parser(
        "backends",
        help="list the kernel backends and which of them work here",
        description="List the kernel backends, which of them work here, and why the others do not.",
    )
    add_log_level(parser)
    parser.set_defaults(command=_backends)


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
