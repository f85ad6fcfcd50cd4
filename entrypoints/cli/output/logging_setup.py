"""Sets up the log of the command. The processes of the engine set up their own."""

import logging
import os
import sys

from loraplex.engine.ipc.log_setup import FORMAT_VARIABLE, LEVEL_VARIABLE, log_formatter

LEVELS = ("debug", "info", "warning", "error")


def configure_logging(level: str | None, log_format: str | None = None) -> None:
    """Send log records of `loraplex` to stderr, in this process and in those that it starts.

    Args:
        level: one of LEVELS. None keeps the level of the environment, or "warning" if it has none.
        log_format: one of LOG_FORMATS. None keeps that of the environment, or "text".
    """
    if level is not None:
        os.environ[LEVEL_VARIABLE] = level
    if log_format is not None:
        os.environ[FORMAT_VARIABLE] = log_format
    name = os.environ.get(LEVEL_VARIABLE, "warning").upper()
    logger = logging.getLogger("loraplex")
    logger.setLevel(name if name in logging.getLevelNamesMapping() else "WARNING")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(log_formatter(""))
        logger.addHandler(handler)
