"""Talks to an engine from asyncio code."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from loraplex.engine.errors import ClientError, EngineDeadError
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.entrypoints.client.lora_mix import LoRA
from loraplex.entrypoints.client.outputs import RequestFailure, RequestOutput, RequestResult
from loraplex.entrypoints.client.session import ClientSession, Message, Prompt
from loraplex.entrypoints.client.tensors.tensor_load import KIND, TensorLoad, is_unreachable
from loraplex.entrypoints.client.transport import SEND_TIMEOUT_MS, SocketTransport

FIRST_RETRY_S = 0.001  # a server that reads makes room at once; doubled at each failure
LAST_RETRY_S = 0.1


class AsyncClient:
    """Talks to one engine from one event loop. Any number of tasks may use it at a time.

    ``async with AsyncClient(endpoint) as client`` connects, or the first call does. Arguments and
    errors are those of Client.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        server_public_key: str | None = None,
        client_secret_key_file: str | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        self._endpoint = endpoint
        self._keys = {
            "server_public_key": server_public_key,
            "client_secret_key_file": client_secret_key_file,
        }
        self._timeout_s = timeout_s
        self._session = ClientSession()
        self._transport: SocketTransport | None = None
        self._connecting = asyncio.Lock()
        self._queues: dict[str, asyncio.Queue[RequestResult | Message]] = {}

    async def generate(  # noqa: PLR0913  # they are keys of the protocol
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        adapter: str | LoRA | None = None,
        request_id: str | None = None,
        salt: str = "",
        priority: int = 0,
        stream: bool = True,
        timeout_s: float | None = None,
        deadline_s: float | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Yields outputs of the request's `output_kind`; see Client.generate.

        Cancelling the task that iterates, or closing the iterator, cancels the request.
        """
        transport = await self._live_transport()
        request_id, message = self._session.generate(
            prompt,
            sampling_params,
            adapter=adapter,
            request_id=request_id,
            salt=salt,
            priority=priority,
            stream=stream,
            deadline_s=deadline_s,
        )
        queue = self._queues[request_id] = asyncio.Queue()
        is_sent = False
        try:
            await self._send(transport, message)
            is_sent = True
            while True:
                output = await self._next(queue, timeout_s)
                yield output
                if output.finished:
                    return
        finally:
            del self._queues[request_id]
            if self._session.has(request_id):
                self._session.forget(request_id)
                if is_sent:
                    await self.cancel(request_id)

    def chat(
        self,
        messages: list[dict[str, Any]],
        sampling_params: SamplingParams | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> AsyncIterator[RequestOutput]:
        """Does what generate() does for a conversation; `options` are generate()'s.

        `chat_template_kwargs` are more variables for the template, such as enable_thinking.
        """
        prompt = {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools,
            "documents": documents,
            "chat_template_kwargs": chat_template_kwargs,
        }
        return self.generate(prompt, sampling_params, **options)

    async def cancel(self, request_id: str) -> None:
        """Ends a request with finish_reason "abort". Ignores unknown ids."""
        if self._transport is not None:
            await self._send(self._transport, {"type": "cancel", "request_id": request_id})

    async def load_adapter(self, name: str, path: str, *, lazy: bool = False) -> dict[str, Any]:
        """Registers an adapter. Its files are read now, or with `lazy` on first use."""
        reply = await self._command("load_adapter", name=name, path=path, lazy=lazy)
        return dict(reply["adapters"][0])

    async def load_adapter_tensors(
        self, name: str, config: Any, tensors: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Loads an adapter from tensors in memory; see Client. Other tasks go on meanwhile."""
        load = TensorLoad(name, config, tensors)
        transport = await self._live_transport()
        try:
            if transport.is_local:
                try:
                    values = await asyncio.to_thread(load.in_memory)
                    return dict((await self._command(KIND, **values))["adapters"][0])
                except ClientError as error:
                    if not is_unreachable(error):
                        raise
            values, frames = await asyncio.to_thread(load.in_frames, transport.max_message_bytes)
            return dict((await self._command(KIND, frames, **values))["adapters"][0])
        finally:
            load.close()

    async def unload_adapter(self, name: str) -> None:
        """Removes an adapter. Requests that use it finish with it."""
        await self._command("unload_adapter", name=name)

    async def pin_adapter(self, name: str) -> dict[str, Any]:
        """Keeps an adapter in pages until unpin_adapter(). AdapterError if too much is pinned."""
        return dict((await self._command("pin_adapter", name=name))["adapters"][0])

    async def unpin_adapter(self, name: str) -> dict[str, Any]:
        """Allows a pinned adapter to be evicted."""
        return dict((await self._command("unpin_adapter", name=name))["adapters"][0])

    async def list_adapters(self, name: str = "") -> list[dict[str, Any]]:
        """Returns all adapters or the one of this name; see docs/reference/protocol.md."""
        return list((await self._command("list_adapters", name=name))["adapters"])

    async def health(self) -> dict[str, Any]:
        """Returns status, model and limits; see docs/reference/protocol.md."""
        return await self._command("health")

    async def stats(self, *, by_tier: bool = False, pool_cells: int = 0) -> dict[str, Any]:
        """Returns what Client.stats() does."""
        fields = {"by_tier": by_tier, "pool_cells": pool_cells}
        return dict((await self._command("stats", **fields))["stats"])

    async def reset_prefix_cache(self) -> dict[str, Any]:
        """Empties the prefix cache. Running requests go on. Returns the stats after it."""
        return dict((await self._command("reset_prefix_cache"))["stats"])

    async def close(self) -> None:
        """Disconnects; unfinished requests are cancelled. Calling again does nothing."""
        if self._transport is not None:
            await self._disconnect(EngineDeadError("the client was closed"))

    async def __aenter__(self) -> "AsyncClient":
        await self._live_transport()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def _live_transport(self) -> SocketTransport:
        """Returns the connection; connects on first use and after a loss."""
        async with self._connecting:
            if self._transport is not None:
                return self._transport
            transport = self._connect()
            try:
                health = await self._ask(transport, "health")
                transport.max_message_bytes = health["max_message_bytes"]
            except EngineDeadError:
                transport.check_reached(self._timeout_s)
                raise
            finally:
                if not transport.max_message_bytes:
                    await self.close()
            return transport

    async def _command(
        self, kind: str, frames: Sequence[memoryview] = (), /, **values: Any
    ) -> Message:
        return await self._ask(await self._live_transport(), kind, frames, **values)

    async def _ask(
        self,
        transport: SocketTransport,
        kind: str,
        frames: Sequence[memoryview] = (),
        /,
        **values: Any,
    ) -> Message:
        request_id, message = self._session.command(kind, **values)
        queue = self._queues[request_id] = asyncio.Queue()
        try:
            await self._send(transport, message, frames)
            answer = await asyncio.wait_for(queue.get(), self._timeout_s)
        except TimeoutError:
            raise EngineDeadError(
                f"no answer to {kind!r} from {self._endpoint} in {self._timeout_s:g} s"
            ) from None
        finally:
            del self._queues[request_id]
            self._session.forget(request_id)
        try:
            if isinstance(answer, RequestFailure):
                raise answer.error
            assert isinstance(answer, dict)
            return answer
        finally:
            del answer  # or error, traceback and this frame would be a cycle that holds the client

    async def _next(
        self, queue: "asyncio.Queue[RequestResult | Message]", timeout_s: float | None
    ) -> RequestOutput:
        try:
            result = await asyncio.wait_for(queue.get(), timeout_s)
        except TimeoutError:
            raise TimeoutError(f"no output in {timeout_s:g} s") from None
        try:
            if isinstance(result, RequestFailure):
                raise result.error
            assert isinstance(result, RequestOutput)
            return result
        finally:
            del result  # or error, traceback and this frame would be a cycle that holds the client

    def _connect(self) -> SocketTransport:
        self._transport = transport = SocketTransport(self._endpoint, **self._keys)
        loop = asyncio.get_running_loop()
        for socket in transport.sockets:
            loop.add_reader(socket, self._take_replies)
        return transport

    def _disconnect(self, error: EngineDeadError) -> "asyncio.Future[None]":
        """Drops the connection and gives `error` to every caller that waits.

        Returns a future of the end. Another thread waits for unsent messages to leave.
        """
        transport, self._transport = self._transport, None
        assert transport is not None
        loop = asyncio.get_running_loop()
        for socket in transport.sockets:
            loop.remove_reader(socket)
        for failure in self._session.fail_all(error):
            self._deliver(failure.request_id, failure)
        return loop.run_in_executor(None, transport.close)

    async def _send(
        self, transport: SocketTransport, message: Message, frames: Sequence[memoryview] = ()
    ) -> None:
        """Sends a message, then takes the replies that have come.

        Other tasks go on while there is no room for it. A ZeroMQ socket's descriptor signals an
        arrival once, and each try to send may consume the signal. So a read follows every try.

        Raises:
            EngineDeadError: there was no room for SEND_TIMEOUT_MS, or the connection was lost.
        """
        data = transport.encode(message)
        deadline = time.monotonic() + SEND_TIMEOUT_MS / 1000
        wait_s = FIRST_RETRY_S
        while True:
            if transport is not self._transport:
                raise EngineDeadError(f"the connection to {self._endpoint} was lost")
            is_sent = transport.try_send(data, frames)
            self._take_replies()
            if is_sent:
                return
            if time.monotonic() >= deadline:
                raise transport.blocked()
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, LAST_RETRY_S)

    def _take_replies(self) -> None:
        """Gives each reply that has come to the caller that waits for it.

        The descriptor signals again only after a read found the socket empty. So a read that found
        replies schedules another one.
        """
        if self._transport is None:
            return
        try:
            replies = self._transport.drain()
        except EngineDeadError as error:
            self._disconnect(error.with_traceback(None))
            return
        for reply in replies:
            result = self._session.on_reply(reply)
            if result is not None:
                self._deliver(*result)
        if replies:
            asyncio.get_running_loop().call_soon(self._take_replies)

    def _deliver(self, request_id: str, result: RequestResult | Message) -> None:
        if request_id in self._queues:
            self._queues[request_id].put_nowait(result)
