"""Limits the memory that clients hold: each of them, and all together."""


class ByteBudget:
    """Counts bytes by client.

    A client that holds nothing may take more than its share at once, so that no single message
    is ever refused for ever.
    """

    def __init__(self, *, for_each: int, in_all: int) -> None:
        self._for_each = for_each
        self._in_all = in_all
        self._held: dict[bytes, int] = {}
        self.total = 0

    def take(self, client: bytes, num_bytes: int) -> bool:
        """Returns False, and takes nothing, if the client or all have too much."""
        if not self.has_share(client, num_bytes) or self.total + num_bytes > self._in_all:
            return False
        if num_bytes:
            self._held[client] = self._held.get(client, 0) + num_bytes
            self.total += num_bytes
        return True

    def has_share(self, client: bytes, num_bytes: int) -> bool:
        """Tells whether the client may hold so many bytes more, whatever the others hold."""
        held = self._held.get(client, 0)
        return not held or held + num_bytes <= self._for_each

    def give_back(self, client: bytes, num_bytes: int) -> None:
        self.total -= num_bytes
        left = self._held.get(client, 0) - num_bytes
        if left > 0:
            self._held[client] = left
        else:
            self._held.pop(client, None)

    def largest(self) -> bytes:
        """Returns the client that holds most; some client must hold something."""
        return max(self._held, key=self._held.__getitem__)
