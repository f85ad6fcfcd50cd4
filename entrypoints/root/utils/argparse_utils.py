"""Offers the parser of flags where vLLM has it."""

from loraplex.entrypoints.offline.flexible_argument_parser import (
    FlexibleArgumentParser as FlexibleArgumentParser,
)
