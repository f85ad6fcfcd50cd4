"""The log handler of the user's own process; the engine's processes make theirs at their start."""

import logging
import os
import sys

LEVELS = ("debug", "info", "warning", "error")
LEVEL_VARIABLE = "LORAPLEX_LOG_LEVEL"
"""Environment variable that the engine's processes read their level from."""


def configure_logging(level: str | None) -> None:
    """Send `loraplex` records of this process and of those it starts to stderr.

    Args:
        level: one of LEVELS; None keeps the environment's, "warning" where that is unset.
    """
    if level is not None:
        os.environ[LEVEL_VARIABLE] = level
    name = os.environ.get(LEVEL_VARIABLE, "warning").upper()
    logger = logging.getLogger("loraplex")
    logger.setLevel(name if name in logging.getLevelNamesMapping() else "WARNING")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
