"""Tracks a frontend's requests from the client's message to the last output."""

import itertools
import math
from array import array
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from loraplex.engine.config import ServerConfig
from loraplex.engine.errors import ClientError, QueueFullError, client_error
from loraplex.engine.frontend.byte_budget import ByteBudget
from loraplex.engine.frontend.inputs import OutsideVocabularyError, num_chars
from loraplex.engine.frontend.limits.client_quota import ClientQuota
from loraplex.engine.frontend.limits.prompt_budget import PromptBudget
from loraplex.engine.frontend.mixing.adapter_lookup import AdapterLookup
from loraplex.engine.frontend.mixing.added_sequences import added_sequences
from loraplex.engine.frontend.protocol import GenerateRequest, aborted_reply, error_reply
from loraplex.engine.frontend.request_log import RequestTimes, log_end
from loraplex.engine.frontend.scheduler_link import SchedulerLink
from loraplex.engine.frontend.statistics.request_histograms import RequestHistograms
from loraplex.engine.frontend.unfinished.unfinished_request import UnfinishedRequest
from loraplex.engine.frontend.vocabularies.request_vocabulary import RequestVocabulary
from loraplex.engine.frontend.vocabularies.vocabulary_table import VocabularyTable
from loraplex.engine.ipc.channel import Wakeup
from loraplex.engine.stores.adapter_store import FolderLeases
from loraplex.scheduler.frontend_protocol import AdapterVocabulary, MixPart, StepOutputs

POOL_PROMPT_CHARS = 16384  # longer texts take milliseconds, so a thread pool tokenizes them
MAX_CONVERTED_A_TURN = 4096  # logprobs; some 40 ms
MAX_POOLED_CHARS = 64 << 20  # total length of the texts that wait for the pool
MAX_CLIENT_CHARS = 32 << 20  # of one client

Reply = Callable[[bytes, dict[str, Any]], None]


class RequestTable:
    """Holds every unfinished request, by client and by sequence."""

    def __init__(
        self,
        *,
        vocabularies: VocabularyTable,
        adapters: AdapterLookup,
        scheduler: SchedulerLink,
        reply: Reply,
        server: ServerConfig,
        wakeup: Wakeup,
    ) -> None:
        """Makes an empty table. `wakeup` is set when a prompt is ready for start_tokenized()."""
        self._vocabularies = vocabularies
        self._adapters = adapters
        self._scheduler = scheduler
        self._reply = reply
        self._quota = ClientQuota(server.max_requests_per_client)
        self._max_timeout_s = server.request_timeout or math.inf
        self._is_private = not server.endpoint  # one client, which may fill the scheduler's queue
        self._wakeup = wakeup
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="tokenize")
        self._tokenized: deque[tuple[UnfinishedRequest, array[int] | ClientError]] = deque()
        self._texts = ByteBudget(for_each=MAX_CLIENT_CHARS, in_all=MAX_POOLED_CHARS)
        self._prompts = PromptBudget()
        self._by_client: dict[bytes, dict[str, UnfinishedRequest]] = {}
        self._by_sequence: dict[int, UnfinishedRequest] = {}
        self._converting: dict[UnfinishedRequest, None] = {}  # in the order of their turns
        self._sequence_ids = itertools.count(1)
        self.histograms = RequestHistograms()
        self.counters = dict.fromkeys(("received", "finished", "failed", "cancelled"), 0)

    def has_requests(self, client: bytes) -> bool:
        return client in self._by_client

    def add(self, client: bytes, message: GenerateRequest) -> None:
        """Starts a request. Errors found after this call returns are sent as replies.

        Raises ClientError if the client or the server has too many requests or the id is in use.
        """
        mine = self._by_client.get(client, {})
        if message.request_id in mine:
            raise client_error(
                "duplicate_request",
                f"request {message.request_id!r} is not finished yet: choose another request_id",
            )
        self._quota.check(client, message.sampling_params.n)
        payer = f"tenant {message.tenant}".encode() if message.tenant else client
        length = num_chars(message)
        self._take_text(payer, length)
        seed = self._vocabularies.base.inputs.seed_of(message.sampling_params)
        times = RequestTimes(min(message.timeout_s or math.inf, self._max_timeout_s))
        vocabulary = self._vocabularies.guess(message)
        request = UnfinishedRequest(client, message, seed, payer, length, vocabulary, times=times)
        self._quota.take(client, message.sampling_params.n)
        self._by_client.setdefault(client, mine)[message.request_id] = request
        self.counters["received"] += 1
        self._encode(request)

    def _take_text(self, payer: bytes, length: int) -> None:
        """Raises QueueFullError if a text is for the pool, and too many wait for it."""
        if length > POOL_PROMPT_CHARS and not self._texts.take(payer, length):
            raise QueueFullError("too many long prompts wait to be tokenized: try again later")

    def _encode(self, request: UnfinishedRequest) -> None:
        """Encodes the prompt, whose text was taken, and goes on; now or in start_tokenized()."""
        if request.num_chars > POOL_PROMPT_CHARS:
            self._pool.submit(self._tokenize_in_pool, request)
            return
        self._look_up(request, request.vocabulary.inputs.try_tokenize(request.message))

    def _tokenize_in_pool(self, request: UnfinishedRequest) -> None:
        token_ids = request.vocabulary.inputs.try_tokenize(request.message)
        self._tokenized.append((request, token_ids))
        self._wakeup.set()

    def start_tokenized(self) -> None:
        """Starts the requests whose prompts the pool has tokenized."""
        self._vocabularies.run_ready()
        while self._tokenized:
            request, token_ids = self._tokenized.popleft()
            self._texts.give_back(request.payer, request.num_chars)
            if self._is_current(request):
                self._look_up(request, token_ids)

    def _look_up(self, request: UnfinishedRequest, token_ids: "array[int] | ClientError") -> None:
        """Starts a request, once its adapters' folders were found."""
        if isinstance(token_ids, OutsideVocabularyError) and request.ask():
            token_ids = array("i", [0])
        try:
            if isinstance(token_ids, ClientError):
                raise token_ids
            num_bytes = request.needed_bytes(len(token_ids))
            self._prompts.take(request.payer, num_bytes)
            request.num_bytes = num_bytes
            if not request.keeps_prompt:
                request.forget_prompt()
        except ClientError as error:
            self._fail(request, error.code, str(error))
            return
        self._adapters.find(request.message, partial(self._start, request, token_ids))

    def _start(
        self,
        request: UnfinishedRequest,
        token_ids: "array[int]",
        parts: list[MixPart] | ClientError,
        leases: FolderLeases,
    ) -> None:
        request.leases = leases
        if not self._is_current(request):
            return request.leases.release()
        message = request.message
        try:
            if isinstance(parts, ClientError):
                raise parts
            specs, grammar = request.sampling(len(token_ids))
        except ClientError as error:
            self._fail(request, error.code, str(error))
            return
        request.outputs = request.vocabulary.outputs.make(message, token_ids)
        ids = [next(self._sequence_ids) for _ in specs]
        request.first_id = ids[0]
        self._by_sequence.update(dict.fromkeys(ids, request))
        added = added_sequences(
            message,
            parts,
            prompt_token_ids=token_ids,
            ids=ids,
            specs=specs,
            grammar=grammar,
            client=b"" if self._is_private else request.client,
            vocabulary=request.vocabulary_key,
        )
        try:
            for sequence in added:
                self._scheduler.send(sequence)
        except ClientError as error:
            self._fail(request, error.code, str(error))  # aborts those that were sent

    @property
    def num_unfinished(self) -> int:
        return sum(map(len, self._by_client.values()))

    @property
    def num_prompt_bytes(self) -> int:
        """Number of bytes that unfinished requests hold."""
        return self._prompts.total

    def on_outputs(self, outputs: StepOutputs) -> None:
        """Takes a step's tokens and sends each request one reply with what is new."""
        touched: dict[UnfinishedRequest, None] = {}
        stopped: list[int] = []
        for output in outputs:
            request = self._by_sequence.get(output.request_id)
            if request is None or request.outputs is None:
                continue  # ended here; the scheduler had not processed the abort
            if output.vocabulary is not None and self._learn(request, output.vocabulary):
                continue
            if output.finish_reason == "error":
                wait_s = output.retry_after_s
                details = {"retry_after_s": wait_s} if wait_s else {}
                self._fail(request, output.error_code or "internal", output.error, **details)
                continue
            if output.token_ids:
                if request.keeps_prompt:
                    self._prompts.give_back(request.payer, request.forget_prompt())
                self.histograms.observe_gap(request.times.on_output(output))
            index = output.request_id - request.first_id
            if request.outputs.update(index, output):
                stopped.append(output.request_id)
            if request.outputs.completions[index].finished:
                del self._by_sequence[output.request_id]
            touched[request] = None
        self._abort(stopped)
        for request in touched:
            if self._is_current(request):
                self._send_output(request)

    def _learn(self, request: UnfinishedRequest, told: AdapterVocabulary) -> bool:
        """Encodes a request again by the vocabulary that the scheduler wants, if it still can."""
        may_learn = request.may_learn()
        if may_learn:
            self._abort(self._withdraw(request))
            self._vocabularies.learn(request.message, told, partial(self._encode_again, request))
        return may_learn

    def _encode_again(
        self, request: UnfinishedRequest, found: RequestVocabulary | ClientError
    ) -> None:
        if not self._is_current(request):
            return
        try:
            request.learn(found)
            self._take_text(request.payer, request.num_chars)
        except ClientError as error:
            self._fail(request, error.code, str(error))
            return
        self._encode(request)

    def _send_output(self, request: UnfinishedRequest) -> None:
        if request.outputs is None:
            return
        if request.outputs.needs_conversion:
            if request not in self._converting:
                self._converting[request] = None
                self._wakeup.set()
            return
        reply = request.outputs.take_reply()
        if request.outputs.finished:
            self.counters["finished"] += 1
            self.histograms.observe(request.times, **request.outputs.sizes)
            self._drop(request, request.outputs.finish_reasons)
        self._send_reply(request, reply)

    def _send_reply(self, request: UnfinishedRequest, reply: dict[str, Any] | None) -> None:
        if reply is not None:
            times = {"times": request.times.to_wire()} if reply["finished"] else {}
            self._reply(request.client, reply | times)

    def convert_logprobs(self) -> None:
        """Prepares a bounded part of the prompt logprobs that wait, in turns of requests."""
        if not self._converting:
            return
        request = next(iter(self._converting))
        del self._converting[request]
        if self._is_current(request) and request.outputs is not None:
            request.outputs.convert(MAX_CONVERTED_A_TURN)
            self._send_output(request)  # or puts it behind the others
        if self._converting:
            self._wakeup.set()

    def cancel(self, client: bytes, request_id: str) -> None:
        """Ends a request. Its last output holds what was generated and not sent yet."""
        request = self._by_client.get(client, {}).get(request_id)
        if request is None:
            return
        self.counters["cancelled"] += 1
        self._abort(self._drop(request, "abort"))
        if request.outputs is None:
            num_sequences = request.message.sampling_params.n
            self._reply(client, aborted_reply(request_id, num_sequences))
            return
        request.outputs.drop_unconverted()
        for completion in request.outputs.completions:
            completion.abort()
        self._send_reply(request, request.outputs.take_reply())

    def expire(self) -> None:
        """Fails the requests whose time is over. Call it about once a second."""
        requests = (request for mine in self._by_client.values() for request in mine.values())
        for late in [request for request in requests if request.times.is_over]:
            text = f"the request did not end within {late.times.timeout_s:g} s (timeout_s)"
            self._fail(late, "timeout", text)

    def drop_client(self, client: bytes) -> list[str]:
        """Ends every request of the client without a reply. Returns their ids."""
        mine = self._by_client.get(client, {})
        request_ids = list(mine)
        for request in list(mine.values()):
            self.counters["cancelled"] += 1
            self._abort(self._drop(request, "client left"))
        return request_ids

    def fail_all(self, code: str, text: str) -> None:
        """Ends every request of every client with an error reply."""
        for mine in list(self._by_client.values()):
            for request in list(mine.values()):
                self._drop(request, code)
                self._reply(request.client, error_reply(request.message.request_id, code, text))

    def close(self) -> None:
        self._vocabularies.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _fail(self, request: UnfinishedRequest, code: str, text: str, **details: float) -> None:
        self.counters["failed"] += 1
        self._abort(self._drop(request, code))
        reply = error_reply(request.message.request_id, code, text, **details)
        self._reply(request.client, reply)

    def _abort(self, sequence_ids: list[int]) -> None:
        if sequence_ids:
            self._scheduler.abort(sequence_ids)

    def _is_current(self, request: UnfinishedRequest) -> bool:
        mine = self._by_client.get(request.client, {})
        return mine.get(request.message.request_id) is request

    def _drop(self, request: UnfinishedRequest, reason: str) -> list[int]:
        """Removes a request and logs why it ended. Returns the ids of its unfinished sequences."""
        message, outputs = request.message, request.outputs
        log_end(message, outputs, reason=reason, times=request.times)
        self.histograms.count_ends(reason, outputs, message.sampling_params.n)
        mine = self._by_client.get(request.client, {})
        mine.pop(request.message.request_id, None)
        self._quota.give_back(request.client, message.sampling_params.n)
        if not mine:
            self._by_client.pop(request.client, None)
        return self._withdraw(request)

    def _withdraw(self, request: UnfinishedRequest) -> list[int]:
        """Frees what a request holds. Returns the ids of its unfinished sequences."""
        self._prompts.give_back(request.payer, request.num_bytes)
        request.num_bytes = 0
        request.leases.release()
        if request.outputs is None:
            return []
        ids = range(request.first_id, request.first_id + len(request.outputs.completions))
        return [i for i in ids if self._by_sequence.pop(i, None) is not None]
