"""The adapters of the live view: one row a name, the most interesting first, a bounded number."""

from collections.abc import Iterable
from heapq import nsmallest
from typing import Any

Row = dict[str, Any]

MAX_ROWS = 200
_TIERS = ("pages", "loading", "host", "disk", "memory")
_COPIED = (
    "name", "owner", "state", "error", "content_hash", "kind", "max_rank", "num_pages", "num_bytes",
    "pinned", "num_running", "num_waiting", "seconds_since_use", "engines",
)  # fmt: skip
_USAGE = (
    "num_requests", "num_loads", "load_mean_ms", "load_max_ms", "ttft_p50_ms", "ttft_p99_ms",
    "hits",
)  # fmt: skip


def adapter_rows(listed: Iterable[Row], resident: Iterable[Row]) -> list[Row]:
    """Returns at most MAX_ROWS rows: the fastest tier first, then users, then the last use.

    Args:
        listed: rows of `list_adapters`, which may be some seconds old.
        resident: `resident_adapters` of `stats`, which says where each content is now.
    """
    now: dict[str, list[Row]] = {}
    for content in resident:
        now.setdefault(content["content_hash"], []).append(content)
    rows = [_row(row, now.get(row["content_hash"], [])) for row in listed]
    return nsmallest(MAX_ROWS, rows, key=_order)


def _row(listed: Row, contents: list[Row]) -> Row:
    row = {key: listed[key] for key in _COPIED if key in listed}
    usage = listed.get("usage") or {}
    row |= {key: usage[key] for key in _USAGE if key in usage}
    row["tier"] = _tier(listed, contents)
    row["num_users"] = sum(content["num_users"] for content in contents)
    return row


def _tier(listed: Row, contents: list[Row]) -> str:
    if any(content["residency"] == "resident" for content in contents):
        return "pages"
    if contents:
        return "loading"
    return "host" if listed["tier"] == "pages" else str(listed["tier"])  # evicted since


def _order(row: Row) -> tuple[Any, ...]:
    used = row.get("seconds_since_use")
    is_new = used is None
    return (_TIERS.index(row["tier"]), -row["num_users"], is_new, used or 0.0, row["name"])


def slots_of(resident: Iterable[Row], engine: str) -> dict[str, Row]:
    """Returns what lies in each adapter slot of an engine, by the slot as text."""
    keys = ("content_hash", "names", "num_pages", "residency", "pinned", "num_users")
    return {
        str(content["adapter_slot"]): {key: content[key] for key in keys}
        for content in resident
        if content.get("engine", "") == engine
    }
