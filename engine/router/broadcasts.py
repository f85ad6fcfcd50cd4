"""Questions and commands that go to all engines, and the one answer made of theirs."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from loraplex.engine.ipc.messages.frontend import (
    AdapterCommand,
    AdapterReply,
    ReplyRows,
    StatsQuery,
    StatsReply,
)
from loraplex.engine.ipc.messages.pool_map import PoolMap
from loraplex.scheduler.adapters.usage import TIERS, merge_snapshots

SUMMED = ("num_requests", "num_running", "num_waiting", "num_users")
USAGES = ("adapter_usage", "base_usage")
ON_EACH_ENGINE = ("registered_adapters", "pinned_adapters")  # their sum would count engines

Row = dict[str, Any]
Answer = list[ReplyRows | AdapterReply | StatsReply]


@dataclass(slots=True)
class _Broadcast:
    message: AdapterCommand | StatsQuery
    pending: set[str]
    rows: list[tuple[str, Row]] = field(default_factory=list)  # engine, row
    stats: dict[str, dict[str, Any]] = field(default_factory=dict)
    pools: list[PoolMap] = field(default_factory=list)
    error: AdapterReply | None = None


class Broadcasts:
    """Holds the unanswered questions by the id that the frontend gave them."""

    def __init__(self) -> None:
        self._open: dict[int, _Broadcast] = {}

    def ask(self, message: AdapterCommand | StatsQuery, engine_ids: Iterable[str]) -> Answer:
        """Remembers a message that was sent to these engines; returns the answer if there are none.

        An engine that leaves before it answers is not waited for.
        """
        broadcast = _Broadcast(message, set(engine_ids))
        self._open[_id_of(message)] = broadcast
        return self._finish(broadcast)

    def command(self, command_id: int) -> AdapterCommand | None:
        """Returns the command of an unanswered id."""
        broadcast = self._open.get(command_id)
        message = broadcast.message if broadcast else None
        return message if isinstance(message, AdapterCommand) else None

    def on_reply(self, engine_id: str, reply: ReplyRows | AdapterReply | StatsReply) -> Answer:
        """Takes an engine's part; returns the answer for the frontend once it is complete."""
        reply_id = reply.command_id if isinstance(reply, AdapterReply) else reply.query_id
        broadcast = self._open.get(reply_id)
        if broadcast is None or engine_id not in broadcast.pending:
            return []
        match reply:
            case ReplyRows():
                broadcast.rows += [(engine_id, row) for row in reply.rows]
                return []
            case AdapterReply():
                broadcast.rows += [(engine_id, row) for row in reply.adapters]
                if reply.error:
                    broadcast.error = broadcast.error or reply
            case StatsReply():
                broadcast.stats[engine_id] = reply.stats
                broadcast.pools += [
                    msgspec.structs.replace(pool, engine=engine_id) for pool in reply.pools
                ]
        broadcast.pending.discard(engine_id)
        return self._finish(broadcast)

    def lose_engine(self, engine_id: str) -> Answer:
        """Stops waiting for an engine; returns the answers that are complete now."""
        answers: Answer = []
        for broadcast in list(self._open.values()):
            if engine_id in broadcast.pending:
                broadcast.pending.discard(engine_id)
                answers += self._finish(broadcast)
        return answers

    def _finish(self, broadcast: _Broadcast) -> Answer:
        if broadcast.pending:
            return []
        message = broadcast.message
        del self._open[_id_of(message)]
        if isinstance(message, StatsQuery):
            rows = [{**row, "engine": engine_id} for engine_id, row in broadcast.rows]
            parts = broadcast.stats
            stats = merge_stats(parts.values()) | {"engines": parts}
            pools = sorted(broadcast.pools, key=lambda pool: pool.engine)
            return [ReplyRows(message.query_id, rows), StatsReply(message.query_id, stats, pools)]
        if broadcast.error is not None:
            return [broadcast.error]
        if not broadcast.rows and message.op != "list":
            text = "no engine has answered: try again later"
            return [AdapterReply(message.command_id, text, "queue_full")]
        return [AdapterReply(message.command_id, adapters=merge_rows(broadcast.rows))]


def merge_rows(rows: Iterable[tuple[str, Row]]) -> list[Row]:
    """Returns one row for each name: the one of the fastest tier, with the requests of all.

    Its key "engines" lists the engines that have the adapter in pages.
    """
    merged: dict[str, Row] = {}
    for engine_id, row in rows:
        former = merged.get(row["name"])
        holds = [engine_id] if row["tier"] == TIERS[0] else []
        if former is None:
            merged[row["name"]] = {**row, "engines": holds}
            continue
        best = min(former, row, key=lambda r: TIERS.index(r["tier"]))
        sums = {key: former[key] + row[key] for key in SUMMED if key in row and key in former}
        sums["usage"] = merge_snapshots(row.get("usage", {}) for row in (former, row))
        merged[row["name"]] = {**best, **sums, "engines": former["engines"] + holds}
    return list(merged.values())


def merge_stats(parts: Collection[dict[str, Any]]) -> dict[str, Any]:
    """Returns the statistics of all engines together, under the keys of one engine's."""
    total = sum_stats(parts)
    for key in ON_EACH_ENGINE:
        if key in total:
            total[key] = max(part.get(key, 0) for part in parts)
    for key in USAGES:
        if key in total:
            total[key] = merge_snapshots(part.get(key, {}) for part in parts)
    return total


def sum_stats(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Returns the sums of the numbers under equal keys, in nested maps too, and nothing else."""
    total: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if isinstance(value, dict):
                total[key] = sum_stats([total.get(key, {}), value])
            elif isinstance(value, int | float) and not isinstance(value, bool):
                total[key] = total.get(key, 0) + value
    return total


def _id_of(message: AdapterCommand | StatsQuery) -> int:
    return message.command_id if isinstance(message, AdapterCommand) else message.query_id
