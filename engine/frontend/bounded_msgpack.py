"""Decodes MessagePack of strangers at a bounded cost."""

from typing import Any

import msgpack

MAX_ELEMENTS = 1 << 18
"""Entries of lists and maps in one message, all levels together, unless prompts may be longer."""


class TooManyElementsError(ValueError):
    """The message has too many list and map entries."""


def unpack(frame: "bytes | memoryview", max_elements: int = MAX_ELEMENTS) -> Any:
    """Returns the value that `frame` encodes.

    Counts the entries of each list and map as it ends, so that a message of many small ones is
    given up early. 16 MiB of empty lists would cost 8 s and 1 GB else.

    Raises:
        TooManyElementsError: there are more than `max_elements` entries.
        Exception: the bytes are no MessagePack; msgpack raises exceptions of many classes.
    """
    num_elements = 0
    too_many = TooManyElementsError(
        f"the message has more than {max_elements} list and map entries: send less at once"
    )

    def count(entries: list[Any]) -> list[Any]:
        nonlocal num_elements
        num_elements += 1 + len(entries)
        if num_elements > max_elements:
            raise too_many
        return entries

    limit = min(len(frame), max_elements)
    try:
        return msgpack.unpackb(
            frame,
            strict_map_key=False,
            list_hook=count,
            object_pairs_hook=lambda pairs: dict(count(pairs)),
            max_array_len=limit,
            max_map_len=limit,
            max_ext_len=0,
        )
    except ValueError as error:
        if "exceeds max_" in str(error) and len(frame) > max_elements:
            raise too_many from None
        raise
