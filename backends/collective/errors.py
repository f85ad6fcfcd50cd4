"""The error of op ``collective``; importing it loads no torch."""


class RankLostError(RuntimeError):
    """Raised when another rank does not answer any more."""
