"""Sends a frontend's messages to the scheduler, whose queue may be full."""

from array import array

from loraplex.engine.errors import QueueFullError, client_error
from loraplex.engine.ipc.channel import Channel, PeerGoneError, SlowPeerError
from loraplex.engine.ipc.messages.frontend import AbortRequests


class SchedulerLink:
    """Refuses requests and commands while there is no room. Keeps aborts until there is."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._aborts: array[int] = array("q")

    def send(self, message: object) -> None:
        """Sends a request or a command without waiting.

        Raises:
            QueueFullError: the scheduler has too many unread messages.
            ClientError: the scheduler is gone (code "engine_dead").
        """
        try:
            self._channel.send(message)
        except SlowPeerError:
            raise QueueFullError(
                "the scheduler has too many messages to read: try again later"
            ) from None
        except PeerGoneError as error:
            raise client_error("engine_dead", f"the scheduler does not answer: {error}") from None

    def abort(self, sequence_ids: list[int]) -> None:
        """Ends sequences, now or when there is room. Unknown ids do no harm."""
        self._aborts.extend(sequence_ids)
        self.flush()

    @property
    def has_unsent(self) -> bool:
        """Tells whether flush() has aborts to send."""
        return bool(self._aborts)

    def flush(self) -> None:
        """Sends the aborts that had no room. Call it now and then while `has_unsent`."""
        if not self._aborts:
            return
        try:
            self._channel.send(AbortRequests(self._aborts))
        except PeerGoneError:
            return
        self._aborts = array("q")
