"""Finds the last earlier occurrence of the n-gram that ends a text."""

from array import array

NOT_FOUND = -1


class NgramIndex:
    """Holds, for each n-gram of a growing text, where its last occurrence ends.

    Takes each token once, in constant time. A text of N tokens has N entries for each n.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        self._tables: list[tuple[int, dict[bytes, int]]] = [
            (size, {}) for size in range(longest, shortest - 1, -1)
        ]

    def add(self, token_ids: "array[int]", end: int) -> int:
        """Add the n-grams that end before `end`; call it for each end in order.

        Returns:
            The place after an earlier occurrence of the longest of them: the tokens from there on
            have followed it. NOT_FOUND if there is none.
        """
        found = NOT_FOUND
        for size, table in self._tables:
            if size > end:
                continue
            key = token_ids[end - size : end].tobytes()
            if found == NOT_FOUND:
                found = table.get(key, NOT_FOUND)
            table[key] = end
        return found
