"""`loraplex keys`: make API keys."""

import argparse

from loraplex.engine.errors import ConfigError
from loraplex.entrypoints.cli import flags
from loraplex.entrypoints.cli.command import add_log_level


def add_keys(commands: "argparse._SubParsersAction[flags.FlagParser]") -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "keys", help="make API keys", description="Make API keys for the file of --api-keys."
    )
    actions = parser.add_subparsers(
        title="actions",
        metavar="ACTION",
        required=True,
        help="one of these",
        parser_class=flags.FlagParser,
    )
    new = actions.add_parser(
        "new",
        help="make a key and print it once",
        description="Make a key and print it once, with the entry that makes a server accept it. "
        "Nothing is stored.",
    )
    new.add_argument(
        "--tenant", required=True, metavar="NAME", help="whose key it is; admin: the operator's"
    )
    add_log_level(new)
    new.set_defaults(command=run)


def run(args: argparse.Namespace) -> int:
    """Prints a fresh key. Raises ConfigError if the tenant cannot have this name."""
    import yaml

    from loraplex.engine.tenants.api_key import key_hash, new_key
    from loraplex.engine.tenants.key_file import check_tenant_name

    try:
        check_tenant_name(args.tenant)
    except ValueError as error:
        raise ConfigError(f"--tenant: {error}") from None
    key = new_key()
    entry = {"tenants": {args.tenant: {"keys": [{"key_sha256": key_hash(key)}]}}}
    print(f"The key of tenant {args.tenant}, shown only now:\n\n  {key}\n")
    print("Add its hash to the file of --api-keys, and send SIGHUP to the server:\n")
    print(yaml.safe_dump(entry, sort_keys=False, allow_unicode=True), end="")
    return 0
