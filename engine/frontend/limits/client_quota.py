"""Limits the unfinished requests of each client."""

from collections import Counter

from loraplex.engine.errors import client_error


class ClientQuota:
    """Counts the unfinished sequences of each client: each of the n answers of a request."""

    def __init__(self, max_requests_per_client: int) -> None:
        self._limit = max_requests_per_client
        self._num_of: Counter[bytes] = Counter()

    def check(self, client: bytes, n: int) -> None:
        """Raises ClientError if the client may not have `n` more.

        A request with a large n is accepted where the client has no other.
        """
        num_own = self._num_of[client]
        if num_own and num_own + n > self._limit:
            raise client_error(
                "too_many_requests",
                f"this client has {num_own} unfinished requests and asks for {n} more; "
                f"max_requests_per_client allows {self._limit}, each of the n answers counted: "
                "send this one after others have finished",
            )

    def take(self, client: bytes, n: int) -> None:
        self._num_of[client] += n

    def give_back(self, client: bytes, n: int) -> None:
        self._num_of[client] -= n
        if not self._num_of[client]:
            del self._num_of[client]
