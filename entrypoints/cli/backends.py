"""`loraplex backends`: list the kernel backends and whether each can run here."""

from collections.abc import Sequence

from loraplex.backends import registry
from loraplex.scheduler.adapters.binding import MAX_BINDINGS

HEADER = ("op", "name", "usable", "auto", "why not")


ADAPTERS = (
    "Each lora backend serves LoRA, DoRA, biases, activated LoRA, and up to "
    f"{MAX_BINDINGS} weighted adapters a request."
)


def run() -> int:
    print("\n".join([*table(registry.list_backends()), "", ADAPTERS]))
    return 0


def table(backends: Sequence[registry.Backend]) -> list[str]:
    """Lines of the table: a header, then one backend a line, in the order in which `auto` tries."""
    rows: list[tuple[str, ...]] = [HEADER]
    taken: set[str] = set()
    for backend in backends:
        reason = backend.probe()
        is_auto = reason is None and backend.op not in taken
        if is_auto:
            taken.add(backend.op)
        usable = "yes" if reason is None else "no"
        rows.append((backend.op, backend.name, usable, "*" if is_auto else "", reason or ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    return [
        "  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
