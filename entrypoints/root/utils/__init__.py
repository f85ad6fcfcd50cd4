"""Offers helpers of scripts where vLLM has them."""

from uuid import uuid4

from loraplex.entrypoints.offline.flexible_argument_parser import (
    FlexibleArgumentParser as FlexibleArgumentParser,
)


def random_uuid() -> str:
    """Returns 32 random hexadecimal digits."""
    return uuid4().hex
