"""Hands out a growing list without copying it."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TypeVar, overload

T = TypeVar("T")


class ListPrefix(Sequence[T]):
    """Reads the entries that a list holds now; entries appended later stay invisible.

    Making one takes O(1) time and memory. It equals a list of the same entries, and adding it to
    a list gives a list. The list must not change in any other way than by appending.
    """

    __slots__ = ("_entries", "_length")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, entries: list[T]) -> None:
        self._entries = entries
        self._length = len(entries)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> T | list[T]:
        positions = range(self._length)[index]  # resolves negative indices, checks the bounds
        if isinstance(positions, range):
            return [self._entries[position] for position in positions]
        return self._entries[positions]

    def __iter__(self) -> Iterator[T]:
        return islice(self._entries, self._length)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, list | ListPrefix):
            return NotImplemented
        return list(self) == list(other)

    def __add__(self, other: Sequence[T]) -> list[T]:
        return [*self, *other]

    def __radd__(self, other: Sequence[T]) -> list[T]:
        return [*other, *self]

    def __repr__(self) -> str:
        return repr(list(self))
