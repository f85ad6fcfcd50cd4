"""Sets up the log of a process of the engine, by variables that all of them inherit."""

import logging
import os
import sys

from loraplex.engine.ipc.json_formatter import JsonFormatter

LEVEL_VARIABLE = "LORAPLEX_LOG_LEVEL"
FORMAT_VARIABLE = "LORAPLEX_LOG_FORMAT"
LOG_FORMATS = ("text", "json")


def set_up_logging(name: str) -> None:
    """Log to standard error with the process's name.

    The level is that of LORAPLEX_LOG_LEVEL, the format that of LORAPLEX_LOG_FORMAT.
    """
    level = os.environ.get(LEVEL_VARIABLE, "WARNING").upper()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(log_formatter(name))
    known = level in logging.getLevelNamesMapping()
    logging.basicConfig(handlers=[handler], level=level if known else "WARNING")
    logging.captureWarnings(writes_json())


def log_formatter(name: str) -> logging.Formatter:
    """Returns the formatter for a process; `name` is empty for the supervisor."""
    if writes_json():
        return JsonFormatter(name)
    prefix = f"{name}: " if name else ""
    return logging.Formatter(f"%(asctime)s %(levelname)s {prefix}%(message)s")


def writes_json() -> bool:
    return os.environ.get(FORMAT_VARIABLE) == "json"
