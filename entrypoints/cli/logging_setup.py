"""Sets up the log of the command. The processes of the engine set up their own."""

import logging
import os
import sys

LEVELS = ("debug", "info", "warning", "error")
LEVEL_VARIABLE = "LORAPLEX_LOG_LEVEL"
"""Environment variable that the engine's processes read their level from."""


def configure_logging(level: str | None) -> None:
    """Send log records of `loraplex` to stderr, in this process and in those that it starts.

    Args:
        level: one of LEVELS. None keeps the level of the environment, or "warning" if it has none.
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
