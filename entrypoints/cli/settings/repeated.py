"""The action of flags that may be given several times."""

import argparse
from collections.abc import Sequence
from typing import Any


class Repeated(argparse.Action):
    """Collects the values in a list.

    A tuple is what a configuration file has set: the first flag of the command line replaces it.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        former = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, [*(former if isinstance(former, list) else ()), values])
