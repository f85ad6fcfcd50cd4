"""`loraplex completion`: print the script with which a shell completes the command's flags."""

import argparse

import shtab

from loraplex.entrypoints.cli import flags
from loraplex.entrypoints.cli.command import add_log_level

SHELLS = {
    "bash": "~/.local/share/bash-completion/completions/loraplex",
    "zsh": "~/.zfunc/_loraplex, with ~/.zfunc in fpath before compinit",
    "fish": "~/.config/fish/completions/loraplex.fish",
}
"""Where each shell looks for the script."""

KINDS = {"PATH": shtab.FILE, "MODEL": shtab.FILE, "DIR": shtab.DIRECTORY}
"""Kinds of paths, by the metavar of a flag."""


def add_completion(
    commands: "argparse._SubParsersAction[flags.FlagParser]", root: argparse.ArgumentParser
) -> None:
    """Add the command. Its script completes `root` with the commands that it has when it runs."""
    places = "\n".join(f"  {shell:<6}{place}" for shell, place in SHELLS.items())
    parser = commands.add_parser(
        "completion",
        help="print a script that completes commands and flags in a shell",
        description="Print a script for a shell. Put it where the shell looks:\n" + places,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=list(SHELLS), help="the shell")
    add_log_level(parser)
    parser.set_defaults(command=lambda args: run(args.shell, root))


def run(shell: str, root: argparse.ArgumentParser) -> int:
    print(script(shell, root))
    return 0


def script(shell: str, root: argparse.ArgumentParser) -> str:
    """Returns the completion script of one of SHELLS."""
    _mark_paths(root)
    return shtab.complete(root, shell)


def _mark_paths(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                _mark_paths(below)
        elif action.metavar in KINDS:
            action.complete = KINDS[action.metavar]  # type: ignore[attr-defined]
