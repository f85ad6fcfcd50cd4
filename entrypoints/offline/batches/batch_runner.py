"""Keeps an engine busy with a batch of requests until all have finished."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress

from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import EngineDeadError, LoraplexError
from loraplex.entrypoints.client.outputs import RequestFailure, RequestOutput
from loraplex.entrypoints.client.sync_client import Client
from loraplex.entrypoints.offline.batch_request import BatchRequest
from loraplex.entrypoints.offline.progress import BarFactory, BatchBar

_CANCEL_WAIT_S = 10.0
_DEATH_WAIT_S = 3.0


class BatchRunner:
    """Runs one batch at a time; calls from several threads take turns."""

    def __init__(
        self, client: Client, config: EngineConfig, death: Callable[[float], str | None]
    ) -> None:
        """Makes the runner of one engine.

        Args:
            death: returns which process of the engine died and how, None if none does so within
                the given seconds.
        """
        self._client = client
        self._config = config
        self._death = death
        self._lock = threading.RLock()
        self._num_requests = 0

    def run(self, batch: list[BatchRequest], use_tqdm: bool | BarFactory) -> list[RequestOutput]:
        """Returns the result of each request, in their order.

        Raises:
            ClientError: the engine refused a request; the others are cancelled.
            EngineDeadError: a process of the engine ended.
        """
        with self._lock:
            if reason := self._death(0.0):
                raise EngineDeadError(reason)
            bar = BatchBar(len(batch), use_tqdm if batch else False)
            indices: dict[str, int] = {}  # of the outstanding requests, by id
            try:
                return self._run_window(batch, indices, bar)
            except EngineDeadError as error:
                # The connection may break before the supervisor sees the process exit.
                if reason := self._death(_DEATH_WAIT_S):
                    raise EngineDeadError(reason) from None
                raise type(error)(str(error)) from None
            except BaseException:  # includes KeyboardInterrupt
                self._cancel(indices)
                raise
            finally:
                bar.close()

    def _run_window(
        self, batch: list[BatchRequest], indices: dict[str, int], bar: BatchBar
    ) -> list[RequestOutput]:
        """Keeps the engine busy with as many requests as it accepts, until all have finished."""
        outputs: dict[int, RequestOutput] = {}
        waiting = deque(range(len(batch)))
        limit = self._max_sequences_outstanding()
        num_sequences = 0
        while waiting or indices:
            while waiting and (
                not indices or num_sequences + batch[waiting[0]].sampling_params.n <= limit
            ):
                index = waiting.popleft()
                request_id = self._new_request_id()
                indices[request_id] = index  # before it is sent: an interrupt must cancel it
                self._submit(batch[index], request_id)
                num_sequences += batch[index].sampling_params.n
            for result in self._client.poll(timeout_s=1.0):
                if result.request_id not in indices:
                    continue  # the late end of a request that an earlier call cancelled
                index = indices.pop(result.request_id)
                if isinstance(result, RequestFailure):
                    where = f"prompt {index}" if len(batch) > 1 else ""
                    raise _with_place(result.error, where)
                num_sequences -= batch[index].sampling_params.n
                outputs[index] = result
                bar.add(result)
        return [outputs[index] for index in range(len(batch))]

    def _max_sequences_outstanding(self) -> int:
        """Returns a number that keeps the engine busy for some steps and within its limits."""
        scheduler, server = self._config.scheduler, self._config.server
        wanted = max(1024, 4 * scheduler.max_num_seqs)
        return min(wanted, scheduler.max_queue_len, server.max_requests_per_client)

    def _new_request_id(self) -> str:
        self._num_requests += 1
        return f"llm-{self._num_requests}"

    def _submit(self, request: BatchRequest, request_id: str) -> None:
        """Sends a request that returns one output, at the end."""
        self._client.submit(
            request.prompt,
            request.sampling_params,
            adapter=request.adapter,
            request_id=request_id,
            salt=request.salt,
            priority=request.priority,
        )

    def _cancel(self, request_ids: Iterable[str]) -> None:
        """Cancels requests and takes their results, so that the next call does not see them."""
        with suppress(LoraplexError):
            for request_id in request_ids:
                self._client.cancel(request_id)
            deadline = time.monotonic() + _CANCEL_WAIT_S
            while self._client.num_outstanding and time.monotonic() < deadline:
                self._client.poll(timeout_s=0.5)


def _with_place(error: LoraplexError, where: str) -> LoraplexError:
    """Returns the same error with `where` in front of its text."""
    if not where or where in str(error):
        return error
    placed = type(error)(f"{where}: {error}")
    placed.code = error.code
    return placed
