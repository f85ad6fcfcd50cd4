"""Offline batches: the class, argument names and result fields of vLLM's."""

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Unpack

from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ClientError, EngineDeadError, LoraplexError
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.engine.ipc.messages import EngineInfo
from loraplex.entrypoints.client.lora_request import LoRARequest
from loraplex.entrypoints.client.outputs import RequestFailure, RequestOutput
from loraplex.entrypoints.client.sync_client import Client
from loraplex.entrypoints.offline.batch import (
    Message,
    Prompt,
    Row,
    chat_prompts,
    completion_prompts,
    make_rows,
)
from loraplex.entrypoints.offline.local_engine import LocalEngine
from loraplex.entrypoints.offline.options import LLMOptions, engine_config_of
from loraplex.entrypoints.offline.progress import BarFactory, BatchBar

if TYPE_CHECKING:
    from loraplex.engine.tokenizer.tokenizer import Tokenizer

SamplingParamsOrList = SamplingParams | Sequence[SamplingParams] | None
LoRARequestOrList = LoRARequest | Sequence[LoRARequest | None] | None

_CANCEL_WAIT_S = 10.0
_DEATH_WAIT_S = 3.0


class LLM:
    """An engine of one's own for batches of prompts.

        with LLM(adapters={"pirate": "examples/adapters/pirate"}) as llm:
            params = SamplingParams(temperature=0.0, max_tokens=64)
            for output in llm.generate(["Hello", "Hello"], params,
                                       lora_request=[None, LoRARequest("pirate")]):
                print(output.outputs[0].text)

    The engine runs in processes of its own, or with `in_process=True` in this one (slower;
    for a debugger). It needs no main guard, works in a notebook, and may be used from several
    threads, one call at a time. It ends with `shutdown()`, with the `with` block, when the
    object is collected, or with the interpreter.

    Args:
        model: a model directory or GGUF file; the packaged SmolLM2-135M-Instruct if empty.
        options: fields of the configuration by name, see LLMOptions and `loraplex serve --help`.

    Raises:
        TypeError: an option is unknown; the message names the nearest.
        ValueError: an option is out of range.
        ConfigError: the engine cannot start like this; the text says what to change.
    """

    def __init__(
        self, model: str = "", *, in_process: bool = False, **options: Unpack[LLMOptions]
    ) -> None:
        self._start(engine_config_of(os.fspath(model), options), in_process)

    @classmethod
    def from_config(cls, config: EngineConfig, *, in_process: bool = False) -> "LLM":
        """The same from a whole configuration; its server part's limits apply, not its endpoint."""
        llm = cls.__new__(cls)
        llm._start(config, in_process)
        return llm

    def _start(self, config: EngineConfig, in_process: bool) -> None:
        self.config = config
        self._lock = threading.RLock()
        self._num_requests = 0
        self._tokenizer: Tokenizer | None = None
        self._registered: dict[str, str] = {}  # adapters that calls brought: name -> path
        self._engine = LocalEngine(config, in_process=in_process)
        self._finalizer = weakref.finalize(self, self._engine.close)

    @property
    def client(self) -> Client:
        """The connection to the engine: streaming, load/unload/list adapters, health, stats."""
        return self._engine.client

    @property
    def info(self) -> EngineInfo:
        """The engine's sizes: context, pages, devices, backends."""
        return self._engine.info

    def get_tokenizer(self) -> "Tokenizer":
        """The engine's tokenizer: encode, decode, chat template. Read on the first call."""
        if self._tokenizer is None:
            from loraplex.engine.checkpoint.locate import resolve_model
            from loraplex.engine.tokenizer.loading import load_tokenizer

            model = self.config.model
            self._tokenizer = load_tokenizer(resolve_model(model.model), model.tokenizer)
        return self._tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParamsOrList = None,
        *,
        use_tqdm: bool | BarFactory = True,
        lora_request: LoRARequestOrList = None,
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Answer every prompt, in one batch; the results come in the order of the prompts.

        Args:
            prompts: one prompt or a list: text, {"prompt": text} or {"prompt_token_ids": [...]},
                each map perhaps with a "cache_salt": equal prompts share cached work only under
                equal salts.
            sampling_params: one for all or one each; SamplingParams() if None.
            use_tqdm: show a progress bar, or what makes one.
            lora_request: the adapter of all prompts, or one each, None for the base model.
            priority: one for all or one each; lower is earlier.

        Raises:
            ValueError, TypeError: found before anything runs.
            ClientError: the engine refused a request; the text says which and why. The other
                requests of the call are cancelled, and the engine goes on.
            EngineDeadError: a process of the engine ended; the text says which and how.
        """
        rows = make_rows(completion_prompts(prompts), sampling_params, lora_request, priority)
        return self._run(rows, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParamsOrList = None,
        *,
        use_tqdm: bool | BarFactory = True,
        lora_request: LoRARequestOrList = None,
        priority: int | Sequence[int] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of them, through the model's chat template.

        Args:
            messages: a conversation is a list of {"role": ..., "content": ...}.
            add_generation_prompt: end the prompt with the header of an answer.
            continue_final_message: let the model go on with the last message.
        """
        prompts = chat_prompts(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        return self._run(make_rows(prompts, sampling_params, lora_request, priority), use_tqdm)

    def shutdown(self) -> None:
        """Stop the engine's processes; calling again does nothing."""
        self._finalizer()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shutdown()

    def _run(self, rows: list[Row], use_tqdm: bool | BarFactory) -> list[RequestOutput]:
        with self._lock:
            if not self._finalizer.alive:
                raise EngineDeadError("this LLM has been shut down")
            if reason := self._engine.death():
                raise EngineDeadError(reason)
            self._register_adapters(rows)
            bar = BatchBar(len(rows), use_tqdm if rows else False)
            row_of: dict[str, int] = {}
            try:
                return self._run_window(rows, row_of, bar)
            except EngineDeadError as error:
                # The connection may break before the process that broke it is seen to be gone.
                raise EngineDeadError(self._engine.death(_DEATH_WAIT_S) or str(error)) from None
            except BaseException:  # Ctrl-C too
                self._cancel(row_of)
                raise
            finally:
                bar.close()

    def _run_window(
        self, rows: list[Row], row_of: dict[str, int], bar: BatchBar
    ) -> list[RequestOutput]:
        """Keep a window of requests with the engine: full enough for it, within its limits."""
        outputs: dict[int, RequestOutput] = {}
        waiting = deque(range(len(rows)))
        limit = self._max_sequences_outstanding()
        num_sequences = 0
        while waiting or row_of:
            while waiting and (
                not row_of or num_sequences + rows[waiting[0]].sampling_params.n <= limit
            ):
                index = waiting.popleft()
                row_of[self._submit(rows[index])] = index
                num_sequences += rows[index].sampling_params.n
            for news in self.client.poll(timeout_s=1.0):
                if news.request_id not in row_of:
                    continue  # the late end of a request that an earlier call cancelled
                index = row_of.pop(news.request_id)
                if isinstance(news, RequestFailure):
                    where = f"prompt {index}" if len(rows) > 1 else ""
                    raise _with_place(news.error, where)
                num_sequences -= rows[index].sampling_params.n
                outputs[index] = news
                bar.add(news)
        return [outputs[index] for index in range(len(rows))]

    def _max_sequences_outstanding(self) -> int:
        """Some steps' worth of work ahead of the engine, below what it would refuse."""
        wanted = max(1024, 4 * self.config.scheduler.max_num_seqs)
        allowed = self.config.scheduler.max_queue_len, self.config.server.max_requests_per_client
        return min(wanted, *allowed)

    def _submit(self, row: Row) -> str:
        request_id = str(self._num_requests)
        self._num_requests += 1
        return self.client.submit(
            row.prompt,
            row.sampling_params,
            adapter=row.adapter,
            request_id=request_id,
            salt=row.salt,
            priority=row.priority,
        )

    def _register_adapters(self, rows: list[Row]) -> None:
        """Read and check the adapters that come with a path, before any prompt is sent."""
        for row in rows:
            adapter = row.adapter
            if adapter is None or not adapter.lora_path:
                continue
            if self._registered.get(adapter.lora_name) != adapter.lora_path:
                try:
                    self.client.load_adapter(adapter.lora_name, adapter.lora_path)
                except ClientError as error:
                    raise _with_place(error, f"adapter {adapter.lora_name!r}") from None
                self._registered[adapter.lora_name] = adapter.lora_path

    def _cancel(self, row_of: dict[str, int]) -> None:
        """Cancel what is outstanding and read its ends, so that the next call starts clean."""
        with suppress(LoraplexError):
            for request_id in row_of:
                self.client.cancel(request_id)
            deadline = time.monotonic() + _CANCEL_WAIT_S
            while self.client.num_outstanding and time.monotonic() < deadline:
                self.client.poll(timeout_s=0.5)


def _with_place(error: LoraplexError, where: str) -> LoraplexError:
    """The same error, saying which of the caller's things it is about."""
    if not where or where in str(error):
        return error
    placed = type(error)(f"{where}: {error}")
    placed.code = error.code
    return placed
