"""The synchronous client."""

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from loraplex.engine.errors import EngineDeadError
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.entrypoints.client.lora_request import LoRARequest
from loraplex.entrypoints.client.outputs import RequestFailure, RequestOutput
from loraplex.entrypoints.client.session import ClientSession, Message, News, Prompt, Transport
from loraplex.entrypoints.client.transport import SocketTransport


class Client:
    """Talks to one engine; use it from one thread at a time. A context manager.

    Errors come as the classes of loraplex.engine.errors: ClientError (the request is at fault;
    AdapterError, UnknownAdapterError, QueueFullError are kinds of it) and EngineDeadError (nobody
    answers, or the engine died with the request). Who does not read is cut off: "slow_client".
    """

    def __init__(
        self,
        endpoint: str | Transport,
        *,
        server_public_key: str | None = None,
        client_secret_key_file: str | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        """Connect and wait for the engine's answer; EngineDeadError when none comes in time.

        `endpoint` is a server's address or an InProcessEngine. `server_public_key` (40 Z85
        characters, or a CurveZMQ certificate file) switches encryption on;
        `client_secret_key_file` names this client's own certificate, where the server admits
        known clients only. `timeout_s` bounds connecting and every command.
        """
        self._endpoint = endpoint
        self._keys = {
            "server_public_key": server_public_key,
            "client_secret_key_file": client_secret_key_file,
        }
        self._timeout_s = timeout_s
        self._session = ClientSession()
        self._transport: Transport | None = None
        self._streams: dict[str, deque[News]] = {}  # requests of generate()
        self._answers: dict[str, Message | RequestFailure] = {}  # to commands
        self._news: deque[News] = deque()  # of submitted requests, for poll()
        self._submitted: set[str] = set()
        self._adapter_paths: dict[str, str] = {}
        self._connect()

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        adapter: str | LoRARequest | None = None,
        request_id: str | None = None,
        salt: str = "",
        priority: int = 0,
        stream: bool = True,
        timeout_s: float | None = None,
    ) -> Iterator[RequestOutput]:
        """Yield the request as it grows (cumulative); with stream=False once, when it is done.

        The request is sent when the iteration begins; leaving it early cancels the request.
        `timeout_s` bounds the wait for each yield; TimeoutError then.
        """
        request_id, message = self._prepare(
            prompt, sampling_params, adapter, request_id, salt, priority, stream
        )
        news = self._streams[request_id] = deque()
        try:
            self._send_request(request_id, message)
            while True:
                output = self._next(news, timeout_s)
                yield output
                if output.finished:
                    return
        finally:
            del self._streams[request_id]
            if self._session.has(request_id):
                self._session.forget(request_id)
                self.cancel(request_id)

    def chat(
        self,
        messages: list[dict[str, Any]],
        sampling_params: SamplingParams | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **options: Any,
    ) -> Iterator[RequestOutput]:
        """Like generate(), for a conversation; `options` are those of generate()."""
        prompt = {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        return self.generate(prompt, sampling_params, **options)

    def submit(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        adapter: str | LoRARequest | None = None,
        request_id: str | None = None,
        salt: str = "",
        priority: int = 0,
        stream: bool = False,
    ) -> str:
        """Send a request and return its id at once; its outcome comes from poll()."""
        request_id, message = self._prepare(
            prompt, sampling_params, adapter, request_id, salt, priority, stream
        )
        self._send_request(request_id, message)
        self._submitted.add(request_id)
        return request_id

    def poll(self, timeout_s: float | None = None) -> list[RequestOutput | RequestFailure]:
        """News of submitted requests: those that finished, and with stream=True those that grew.

        Waits until there is some, or `timeout_s` has passed; [] then, and at once when nothing
        is outstanding. When the engine dies every outstanding request comes back as a
        RequestFailure holding EngineDeadError.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._news and self._submitted:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left < 0:
                break
            self._pump(left)
        news = list(self._news)
        self._news.clear()
        for item in news:
            if isinstance(item, RequestFailure) or item.finished:
                self._submitted.discard(item.request_id)
        return news

    @property
    def num_outstanding(self) -> int:
        """Submitted requests whose end poll() has not returned yet."""
        return len(self._submitted)

    def cancel(self, request_id: str) -> None:
        """End a request; it finishes with finish_reason "abort". Unknown ids are ignored."""
        if self._transport is not None:
            self._transport.send({"type": "cancel", "request_id": request_id})

    def load_adapter(self, name: str, path: str, *, lazy: bool = False) -> dict[str, Any]:
        """Make an adapter known; read and checked now, or with `lazy` on its first use.

        Returns the adapter as list_adapters() shows it.
        """
        reply = self._command("load_adapter", name=name, path=path, lazy=lazy)
        self._adapter_paths[name] = path
        return dict(reply["adapters"][0])

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; requests that use it go on with it."""
        self._command("unload_adapter", name=name)
        self._adapter_paths.pop(name, None)

    def pin_adapter(self, name: str) -> dict[str, Any]:
        """Keep an adapter in pages until unpin_adapter(); AdapterError beyond the pinned share."""
        return dict(self._command("pin_adapter", name=name)["adapters"][0])

    def unpin_adapter(self, name: str) -> dict[str, Any]:
        """Let a pinned adapter be evicted again once it is idle."""
        return dict(self._command("unpin_adapter", name=name)["adapters"][0])

    def list_adapters(self, name: str = "") -> list[dict[str, Any]]:
        """All, or the one of this name: tier, size, users, pins, service; see docs/protocol.md."""
        return list(self._command("list_adapters", name=name)["adapters"])

    def health(self) -> dict[str, Any]:
        """Status, model and limits; see docs/protocol.md."""
        return self._command("health")

    def stats(self) -> dict[str, Any]:
        """Load, memory and counters of the scheduler and of the frontend."""
        return dict(self._command("stats")["stats"])

    def close(self) -> None:
        """Leave; what is unfinished is cancelled. Idempotent."""
        if self._transport is not None:
            transport, self._transport = self._transport, None
            try:
                transport.send({"type": "bye"})
            except EngineDeadError:
                pass
            finally:
                transport.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _connect(self) -> None:
        endpoint = self._endpoint
        if not isinstance(endpoint, str):
            self._transport = endpoint
            return
        transport = SocketTransport(endpoint, **self._keys)
        self._transport = transport
        try:
            transport.max_message_bytes = self.health()["max_message_bytes"]
        except BaseException:
            self.close()
            raise

    def _prepare(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None,
        adapter: str | LoRARequest | None,
        request_id: str | None,
        salt: str,
        priority: int,
        stream: bool,
    ) -> tuple[str, Message]:
        """Make the adapter known where it comes with a path, and the request's message."""
        if isinstance(adapter, LoRARequest) and adapter.lora_path:
            name, path = adapter.lora_name, adapter.lora_path
            if self._adapter_paths.get(name) != path:
                self.load_adapter(name, path, lazy=True)
        return self._session.generate(
            prompt,
            sampling_params,
            adapter=adapter,
            request_id=request_id,
            salt=salt,
            priority=priority,
            stream=stream,
        )

    def _send_request(self, request_id: str, message: Message) -> None:
        try:
            self._live_transport().send(message)
        except BaseException:
            self._session.forget(request_id)
            raise

    def _command(self, kind: str, /, **values: Any) -> Message:
        transport = self._live_transport()
        request_id, message = self._session.command(kind, **values)
        transport.send(message)
        deadline = time.monotonic() + self._timeout_s
        while request_id not in self._answers:
            left = deadline - time.monotonic()
            if left <= 0:
                self._session.forget(request_id)
                raise EngineDeadError(
                    f"no answer to {kind!r} from {self._endpoint} in {self._timeout_s:g} s"
                )
            self._pump(left)
        answer = self._answers.pop(request_id)
        if isinstance(answer, RequestFailure):
            raise answer.error
        return answer

    def _live_transport(self) -> Transport:
        """The connection; a new one where the last was lost."""
        while self._transport is not None and self._transport.is_lost():
            self._pump(0.0)  # hands out what had come, then the loss
        if self._transport is None:
            if not isinstance(self._endpoint, str):
                raise EngineDeadError("the engine has stopped")
            self._connect()
        assert self._transport is not None
        return self._transport

    def _next(self, news: deque[News], timeout_s: float | None) -> RequestOutput:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not news:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"no output in {timeout_s:g} s")
            self._pump(left)
        item = news.popleft()
        if isinstance(item, RequestFailure):
            raise item.error
        return item

    def _pump(self, timeout_s: float | None) -> None:
        """Wait for replies and hand each to whom it concerns."""
        try:
            if self._transport is None:
                raise EngineDeadError("the client was closed")
            replies = self._transport.receive(timeout_s)
        except EngineDeadError as error:
            transport, self._transport = self._transport, None
            if transport is not None:
                transport.close()
            for failure in self._session.fail_all(error):
                self._deliver(failure.request_id, failure)
            return
        for reply in replies:
            event = self._session.on_reply(reply)
            if event is not None:
                self._deliver(*event)

    def _deliver(self, request_id: str, event: News | Message) -> None:
        if isinstance(event, dict):
            self._answers[request_id] = event
        elif request_id in self._streams:
            self._streams[request_id].append(event)
        elif request_id in self._submitted:
            self._news.append(event)
        elif isinstance(event, RequestFailure):
            self._answers[request_id] = event
