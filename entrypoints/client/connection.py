"""Keeps a synchronous client connected to one engine."""

import time
from collections.abc import Sequence
from typing import Any

from loraplex.engine.errors import ClientError, EngineDeadError
from loraplex.entrypoints.client.inbox import Inbox
from loraplex.entrypoints.client.outputs import RequestFailure
from loraplex.entrypoints.client.session import ClientSession, Message, Transport
from loraplex.entrypoints.client.tensors.tensor_load import KIND, TensorLoad, is_unreachable
from loraplex.entrypoints.client.transport import SocketTransport


class Connection:
    """Sends requests and commands, and puts the results of the replies into `inbox`.

    Connects on construction, and again at the next send after a loss.
    """

    def __init__(
        self, endpoint: str | Transport, *, keys: dict[str, str | None], timeout_s: float
    ) -> None:
        """`keys` are the key arguments of SocketTransport; see Client for the errors."""
        self.session = ClientSession()
        self.inbox = Inbox()
        self._endpoint = endpoint
        self._keys = keys
        self._timeout_s = timeout_s
        self._transport: Transport | None = None
        self._connect()

    def send_request(self, request_id: str, message: Message) -> None:
        """Sends a request of `session`, which forgets it if sending fails."""
        try:
            self._live_transport().send(message)
        except BaseException:
            self.session.forget(request_id)
            raise

    def cancel(self, request_id: str) -> None:
        """Cancels a request. Does nothing without a connection: the server cancelled it then."""
        if self._transport is not None:
            self._transport.send({"type": "cancel", "request_id": request_id})

    def load_tensors(self, load: TensorLoad) -> Message:
        """Sends an adapter's tensors and returns the answer; raises as command()."""
        transport = self._live_transport()
        try:
            if transport.is_local:
                try:
                    return self.command(KIND, **load.in_memory())
                except ClientError as error:
                    if not is_unreachable(error):
                        raise
            values, frames = load.in_frames(transport.max_message_bytes)
            return self.command(KIND, frames, **values)
        finally:
            load.close()

    def command(self, kind: str, frames: Sequence[memoryview] = (), /, **values: Any) -> Message:
        """Sends a command, and the frames that belong to it, and returns the answer.

        Raises:
            LoraplexError: the answer is an error, or none came in time.
        """
        transport = self._live_transport()
        request_id, message = self.session.command(kind, **values)
        transport.send(message, frames)
        deadline = time.monotonic() + self._timeout_s
        while (answer := self.inbox.take_answer(request_id)) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                self.session.forget(request_id)
                raise EngineDeadError(
                    f"no answer to {kind!r} from {self._endpoint} in {self._timeout_s:g} s"
                )
            self.pump(left)
        try:
            if isinstance(answer, RequestFailure):
                raise answer.error
            return answer
        finally:
            del answer  # or error, traceback and this frame would be a cycle that holds the client

    def pump(self, timeout_s: float | None) -> None:
        """Waits for replies and puts their results into the inbox.

        After a loss the results are an EngineDeadError for each request and command.
        """
        try:
            if self._transport is None:
                raise EngineDeadError("the client was closed")
            replies = self._transport.receive(timeout_s)
        except EngineDeadError as error:
            transport, self._transport = self._transport, None
            if transport is not None:
                transport.close()
            for failure in self.session.fail_all(error.with_traceback(None)):
                self.inbox.put(failure.request_id, failure)
            return
        for reply in replies:
            result = self.session.on_reply(reply)
            if result is not None:
                self.inbox.put(*result)

    def close(self) -> None:
        """Disconnects. Calling again does nothing."""
        if self._transport is not None:
            transport, self._transport = self._transport, None
            transport.close()

    def _connect(self) -> None:
        if not isinstance(self._endpoint, str):
            self._transport = self._endpoint
            return
        transport = SocketTransport(self._endpoint, **self._keys)
        self._transport = transport
        try:
            transport.max_message_bytes = self.command("health")["max_message_bytes"]
        except EngineDeadError:
            transport.check_reached(self._timeout_s)
            raise
        finally:
            if not transport.max_message_bytes:
                self.close()

    def _live_transport(self) -> Transport:
        while self._transport is not None and self._transport.is_lost():
            self.pump(0.0)  # takes the replies that came before the loss, then the loss
        if self._transport is None:
            if not isinstance(self._endpoint, str):
                raise EngineDeadError("the engine has stopped")
            self._connect()
        assert self._transport is not None
        return self._transport
