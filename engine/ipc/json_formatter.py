"""Writes log records as JSON, one object a line."""

import logging
import time
from typing import Any

import msgspec

_encode = msgspec.json.Encoder(enc_hook=str).encode


def json_line(process: str, level: str, seconds: float | None = None, **fields: Any) -> str:
    """Returns a line of the log.

    Args:
        process: its name, such as "frontend 0"; "" for the supervisor.
        level: "debug" to "error".
        seconds: Unix time; None for now.
        fields: the rest of the object.
    """
    seconds = time.time() if seconds is None else seconds
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    head = {
        "time": f"{moment}.{int(seconds % 1 * 1000):03}Z",
        "level": level,
        "process": process or "supervisor",
    }
    return _encode(head | fields).decode()


class JsonFormatter(logging.Formatter):
    """Makes a line of `time`, `level`, `process`, `logger`, and `message` or the record's fields.

    A record with the attribute `fields` is an event of a known kind. Its fields replace the text.
    """

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, "fields", None) or {"message": record.getMessage()}
        if record.exc_info:
            fields = fields | {"exception": self.formatException(record.exc_info)}
        level = record.levelname.lower()
        return json_line(self._process, level, record.created, logger=record.name, **fields)
