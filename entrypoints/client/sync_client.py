"""Talks to an engine from synchronous code."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.entrypoints.client.connection import Connection
from loraplex.entrypoints.client.lora_mix import LoRA
from loraplex.entrypoints.client.outputs import RequestFailure, RequestOutput, RequestResult
from loraplex.entrypoints.client.session import Prompt, Transport
from loraplex.entrypoints.client.tensors.tensor_load import TensorLoad


class Client:
    """Talks to one engine. Use it from one thread at a time. It is a context manager.

    Errors are the classes of loraplex.engine.errors. ClientError means that the request is at
    fault; AdapterError, UnknownAdapterError and QueueFullError are subclasses. EngineDeadError
    means that the engine does not answer, or died with the request. The server cancels the
    requests of a client that does not read its replies: ClientError with code "slow_client".
    """

    def __init__(
        self,
        endpoint: str | Transport,
        *,
        server_public_key: str | None = None,
        client_secret_key_file: str | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        """Connects and waits for the engine's answer.

        Args:
            endpoint: the address of a server, or an InProcessEngine.
            server_public_key: 40 Z85 characters or a CurveZMQ certificate file; encrypts.
            client_secret_key_file: this client's certificate, if the server admits only known
                clients.
            timeout_s: the longest wait for the connection and for each command's answer.

        Raises:
            EngineDeadError: no answer came in time.
            ConfigError: the endpoint or a key cannot be used.
        """
        self._connection = Connection(
            endpoint,
            keys={
                "server_public_key": server_public_key,
                "client_secret_key_file": client_secret_key_file,
            },
            timeout_s=timeout_s,
        )

    def generate(  # noqa: PLR0913  # they are keys of the protocol
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
    ) -> Iterator[RequestOutput]:
        """Yields outputs of the request's `output_kind` until it has finished.

        Iterating sends the request; leaving the iteration early cancels it.

        Args:
            adapter: a registered name, or a LoRARequest, whose path must lie under the server's
                `adapter_root`.
            salt: requests with different salts share no cached prefixes.
            priority: lower is earlier.
            stream: False means the same as RequestOutputKind.FINAL_ONLY.
            timeout_s: the longest wait for each output.
            deadline_s: the server fails the request with the code "timeout" if it has not ended
                by then, in seconds after its arrival; the protocol's `timeout_s`.

        Raises:
            TimeoutError: no output came in `timeout_s`; the request is cancelled.
        """
        request_id, message = self._connection.session.generate(
            prompt,
            sampling_params,
            adapter=adapter,
            request_id=request_id,
            salt=salt,
            priority=priority,
            stream=stream,
            deadline_s=deadline_s,
        )
        queue = self._connection.inbox.open_queue(request_id)
        try:
            self._connection.send_request(request_id, message)
            while True:
                output = self._next(queue, timeout_s)
                yield output
                if output.finished:
                    return
        finally:
            self._connection.inbox.close_queue(request_id)
            if self._connection.session.has(request_id):
                self._connection.session.forget(request_id)
                self.cancel(request_id)

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
    ) -> Iterator[RequestOutput]:
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

    def submit(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        adapter: str | LoRA | None = None,
        request_id: str | None = None,
        salt: str = "",
        priority: int = 0,
        stream: bool = False,
        deadline_s: float | None = None,
    ) -> str:
        """Sends a request and returns its id at once. poll() returns its results.

        With stream=True these are outputs of its `output_kind`, otherwise one at the end.
        """
        request_id, message = self._connection.session.generate(
            prompt,
            sampling_params,
            adapter=adapter,
            request_id=request_id,
            salt=salt,
            priority=priority,
            stream=stream,
            deadline_s=deadline_s,
        )
        self._connection.send_request(request_id, message)
        self._connection.inbox.submitted.add(request_id)
        return request_id

    def poll(self, timeout_s: float | None = None) -> list[RequestResult]:
        """Returns the results of submitted requests that have come, in order.

        Waits for the first one. Returns [] after `timeout_s`, and at once if no request is
        outstanding. If the engine dies, each outstanding request results in a RequestFailure
        with an EngineDeadError.
        """
        inbox = self._connection.inbox
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while inbox.submitted and not inbox.has_submitted_results:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left < 0:
                break
            self._connection.pump(left)
        return inbox.take_submitted()

    @property
    def num_outstanding(self) -> int:
        """Number of submitted requests whose end poll() has not returned."""
        return len(self._connection.inbox.submitted)

    def cancel(self, request_id: str) -> None:
        """Ends a request with finish_reason "abort". Ignores unknown ids."""
        self._connection.cancel(request_id)

    def load_adapter(self, name: str, path: str, *, lazy: bool = False) -> dict[str, Any]:
        """Registers an adapter. Its files are read now, or with `lazy` on first use.

        Returns the adapter as list_adapters() shows it.
        """
        reply = self._connection.command("load_adapter", name=name, path=path, lazy=lazy)
        return dict(reply["adapters"][0])

    def load_adapter_tensors(
        self, name: str, config: Any, tensors: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Loads an adapter from tensors in memory, such as a trainer's; no file is written.

        A server on this machine takes them from shared memory. They reach another one in frames,
        if it was started with --allow-adapter-upload. A known name means the new tensors from the
        answer on; requests that came before finish with the old ones.

        Args:
            config: the map that adapter_config.json would hold, or PEFT's LoraConfig.
            tensors: by the names of adapter_model.safetensors, as PEFT's
                get_peft_model_state_dict() returns them; of torch, on any device, or of numpy.

        Raises:
            TypeError: a value is no tensor of floating-point numbers.
            AdapterError: the adapter cannot be served; the text names the tensor and the reason.
            ClientError: the server takes no tensors, or not so many bytes.
        """
        reply = self._connection.load_tensors(TensorLoad(name, config, tensors))
        return dict(reply["adapters"][0])

    def unload_adapter(self, name: str) -> None:
        """Removes an adapter. Requests that use it finish with it."""
        self._connection.command("unload_adapter", name=name)

    def pin_adapter(self, name: str) -> dict[str, Any]:
        """Keeps an adapter in pages until unpin_adapter(). AdapterError if too much is pinned."""
        return dict(self._connection.command("pin_adapter", name=name)["adapters"][0])

    def unpin_adapter(self, name: str) -> dict[str, Any]:
        """Allows a pinned adapter to be evicted."""
        return dict(self._connection.command("unpin_adapter", name=name)["adapters"][0])

    def list_adapters(self, name: str = "") -> list[dict[str, Any]]:
        """Returns all adapters or the one of this name; see docs/reference/protocol.md."""
        return list(self._connection.command("list_adapters", name=name)["adapters"])

    def health(self) -> dict[str, Any]:
        """Returns status, model and limits; see docs/reference/protocol.md."""
        return self._connection.command("health")

    def stats(self, *, by_tier: bool = False, pool_cells: int = 0) -> dict[str, Any]:
        """Returns load, memory and counters of the scheduler and of the frontend.

        Args:
            by_tier: the names of adapters by tier replace the adapters in pages.
            pool_cells: if not 0, "pools" has a map of the page pool of at most that many cells.
        """
        fields = {"by_tier": by_tier, "pool_cells": pool_cells}
        return dict(self._connection.command("stats", **fields)["stats"])

    def reset_prefix_cache(self) -> dict[str, Any]:
        """Empties the prefix cache. Running requests go on. Returns the stats after it."""
        return dict(self._connection.command("reset_prefix_cache")["stats"])

    def close(self) -> None:
        """Disconnects; unfinished requests are cancelled. Calling again does nothing."""
        self._connection.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _next(self, queue: deque[RequestResult], timeout_s: float | None) -> RequestOutput:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not queue:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"no output in {timeout_s:g} s")
            self._connection.pump(left)
        result = queue.popleft()
        try:
            if isinstance(result, RequestFailure):
                raise result.error
            return result
        finally:
            del result  # or error, traceback and this frame would be a cycle that holds the client
