"""Answers batches of prompts offline; class, arguments and results are named as in vLLM."""

import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack

from loraplex.engine.checkpoint.generation_defaults import generation_defaults
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import EngineDeadError
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.engine.ipc.messages.frontend import EngineInfo
from loraplex.entrypoints.client.lora_mix import LoRA
from loraplex.entrypoints.client.outputs import RequestOutput
from loraplex.entrypoints.client.sync_client import Client
from loraplex.entrypoints.client.tensors.tensor_loader import TensorLoader
from loraplex.entrypoints.offline.batch_request import BatchRequest, make_batch
from loraplex.entrypoints.offline.batches.batch_runner import BatchRunner
from loraplex.entrypoints.offline.batches.beam_search import (
    BeamSearch,
    BeamSearchOutput,
    BeamSearchParams,
    run_beam_searches,
)
from loraplex.entrypoints.offline.engine_args import EngineArgs
from loraplex.entrypoints.offline.llm_engine import LLMEngine
from loraplex.entrypoints.offline.local_engine import LocalEngine
from loraplex.entrypoints.offline.metrics import Metric, metrics_of
from loraplex.entrypoints.offline.missing import INSTEAD
from loraplex.entrypoints.offline.options import LLMOptions, engine_config_of
from loraplex.entrypoints.offline.progress import BarFactory, bar_factory
from loraplex.entrypoints.offline.prompts import (
    Message,
    Prompt,
    chat_prompts,
    completion_prompts,
    rendered,
)

if TYPE_CHECKING:
    from loraplex.engine.tokenizer.tokenizer import Tokenizer

SamplingParamsOrList = SamplingParams | Sequence[SamplingParams] | None
LoRARequestOrList = LoRA | Sequence[LoRA | None] | None


class LLM(TensorLoader):
    """Starts an engine and answers batches of prompts with it.

        with LLM(adapters={"pirate": "examples/adapters/pirate"}) as llm:
            params = SamplingParams(temperature=0.0, max_tokens=64)
            for output in llm.generate(["Hello", "Hello"], params,
                                       lora_request=[None, LoRARequest("pirate")]):
                print(output.outputs[0].text)

    The engine runs in its own processes, or with `in_process=True` in this one, which is slower
    and suits a debugger. A script needs no main guard, and a notebook works. Several threads may
    use it; their calls run one after the other. The engine stops at `shutdown()`, at the end of
    the `with` block, when the object is garbage-collected, or when the interpreter exits.

    Args:
        model: a model directory or GGUF file; the packaged SmolLM2-135M-Instruct if empty.
        options: fields of the configuration; see LLMOptions and `loraplex serve --help`.

    Raises:
        TypeError: an option is unknown; the message names the most similar one.
        ValueError: an option is out of range.
        ConfigError: the engine cannot start; the text says what to change.
    """

    def __init__(
        self, model: str = "", *, in_process: bool = False, **options: Unpack[LLMOptions]
    ) -> None:
        self._start(engine_config_of(os.fspath(model), options), in_process)

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> "LLM":
        """Makes an LLM from its keywords."""
        return cls.from_config(engine_args.create_engine_config())

    @classmethod
    def from_config(cls, config: EngineConfig, *, in_process: bool = False) -> "LLM":
        """Makes an LLM from a whole configuration, of which the endpoint is ignored."""
        llm = cls.__new__(cls)
        llm._start(config, in_process)
        return llm

    def _start(self, config: EngineConfig, in_process: bool) -> None:
        self.config = config
        self._tokenizer: Tokenizer | None = None
        self._hugging_face: Any = None
        self._engine = LocalEngine(config, in_process=in_process)
        self._connect()
        self._finalizer = weakref.finalize(self, self._engine.close)

    def _connect(self) -> None:
        self._runner = BatchRunner(self._engine.client, self.config, self._engine.death)
        self._llm_engine: LLMEngine | None = None

    @property
    def client(self) -> Client:
        """The engine's client: streaming, loading and listing adapters, health, stats."""
        return self._engine.client

    @property
    def info(self) -> EngineInfo:
        """The engine's sizes: context, pages, devices, backends."""
        return self._engine.info

    @property
    def llm_engine(self) -> LLMEngine:
        """The same engine step by step, with adapters by `lora_int_id`."""
        if self._llm_engine is None:
            self._llm_engine = LLMEngine(self._engine)
        return self._llm_engine

    def get_tokenizer(self) -> Any:
        """Returns transformers' tokenizer of a Hugging Face folder, if transformers is installed,
        else the engine's. Both have `encode`, `decode` and `apply_chat_template`."""
        model, own = self.config.model, self.engine_tokenizer
        if self._hugging_face is None:
            from loraplex.engine.tokenizer.hugging_face import load_hugging_face

            path = Path(model.tokenizer or model.model).expanduser()
            template = own.chat_template if model.chat_template else None
            self._hugging_face = load_hugging_face(path, template) or own
        return self._hugging_face

    @property
    def engine_tokenizer(self) -> "Tokenizer":
        """The engine's tokenizer, with its chat template. The first use loads it."""
        if self._tokenizer is None:
            from loraplex.engine.checkpoint.locate import resolve_model
            from loraplex.engine.tokenizer.loading import load_tokenizer

            model = self.config.model
            path = resolve_model(model.model)
            self._tokenizer = load_tokenizer(path, model.tokenizer, model.chat_template)
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Returns what generate() and chat() use without parameters: the model's defaults.

        They are those of generation_config.json; other fields are SamplingParams' own.
        """
        return SamplingParams(**generation_defaults(self.config.model.model))  # type: ignore[arg-type]

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParamsOrList = None,
        *,
        use_tqdm: bool | BarFactory = True,
        lora_request: LoRARequestOrList = None,
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Answers every prompt in one batch. Returns the results in the order of the prompts.

        Each result holds the whole answer: `output_kind` is ignored.

        Args:
            prompts: one prompt or a list: text, token ids, {"prompt": text} or
                {"prompt_token_ids": [...]}.
                A map may have a "cache_salt": prompts share cached work only under equal salts.
            sampling_params: one for all prompts or one each; the model's defaults if None.
            use_tqdm: True for a progress bar, or a function that makes one.
            lora_request: the adapter of all prompts or one each; None is the base model.
            priority: one for all prompts or one each; lower is earlier.

        Raises:
            ValueError, TypeError: an argument is wrong; nothing was sent.
            ClientError: the engine refused a request; the text says which and why. The other
                requests of the call are cancelled, and the engine goes on.
            ConnectionLostError: the frontend ended and is started again; call again.
            EngineDeadError: another process of the engine ended; the text says which and how.
        """
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        batch = make_batch(completion_prompts(prompts), sampling_params, lora_request, priority)
        return self._run(batch, use_tqdm)

    def chat(  # noqa: PLR0913  # the arguments are vLLM's
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParamsOrList = None,
        use_tqdm: bool | BarFactory = True,
        lora_request: LoRARequestOrList = None,
        *,
        priority: int | Sequence[int] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or a list of them, through the model's chat template.

        The other arguments and the errors are those of generate(). `prompt` of a result is the
        rendered text.

        Args:
            messages: one or more conversations, lists of {"role": ..., "content": ...}.
            add_generation_prompt: end the prompt with the header of an answer.
            continue_final_message: let the model continue the last message.
            tools: JSON schemas of the functions that the model may call.
            documents: maps with "title" and "text", for templates that read them.
            chat_template: Jinja source that replaces the model's template.
            chat_template_kwargs: more variables for the template, such as enable_thinking.
        """
        prompts = chat_prompts(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            documents=documents,
            chat_template_kwargs=chat_template_kwargs,
        )
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        if chat_template is not None:
            prompts = [rendered(prompt, self.engine_tokenizer, chat_template) for prompt in prompts]
        batch = make_batch(prompts, sampling_params, lora_request, priority)
        outputs = self._run(batch, use_tqdm)
        for output in outputs:
            if output.prompt_token_ids:
                tokenizer = self.engine_tokenizer
                output.prompt = tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)
        return outputs

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        lora_request: LoRARequestOrList = None,
        *,
        use_tqdm: bool | BarFactory = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """Finds the likeliest continuations of every prompt. Results are in the prompts' order.

        Each token is a request of its own, which reads the beams' blocks from the prefix cache.

        Args:
            prompts: as for generate(); text needs the tokenizer.
            params: the number of beams and their length.
            use_tqdm: shows the progress in tokens.
            concurrency_limit: prompts searched at one time; None: all.

        Raises:
            ValueError, TypeError, ClientError, EngineDeadError: as generate().
        """
        batch = make_batch(completion_prompts(prompts), None, lora_request, None)
        searches = [self._begin_beam_search(request, params) for request in batch]
        size = concurrency_limit or max(1, len(searches))
        make_bar = bar_factory(use_tqdm)
        options = {"total": params.max_tokens, "desc": "Beam search", "disable": not use_tqdm}
        for start in range(0, len(searches), size):
            with make_bar(**options) as bar:
                run_beam_searches(
                    searches[start : start + size],
                    params.max_tokens,
                    lambda requests: self._run(requests, use_tqdm=False),
                    bar.update,
                )
        outputs = [search.output() for search in searches]
        if not self.config.model.skip_tokenizer_init:
            for beam in (beam for output in outputs for beam in output.sequences):
                beam.text = self.engine_tokenizer.decode(beam.tokens, skip_special_tokens=False)
        return outputs

    def _begin_beam_search(self, request: BatchRequest, params: BeamSearchParams) -> BeamSearch:
        eos_token_ids = {i for worker in self.info.workers for i in worker.eos_token_ids}
        if not self.config.model.skip_tokenizer_init:
            eos_token_ids.update(self.engine_tokenizer.eos_token_ids)
        token_ids = request.prompt.get("prompt_token_ids")
        if token_ids is None:
            token_ids = self.engine_tokenizer.encode(request.prompt["prompt"])
        return BeamSearch(
            request,
            token_ids,
            params,
            eos_token_ids=eos_token_ids,
            max_model_len=self.info.max_model_len,
        )

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Empties the prefix cache and returns True. vLLM's arguments are ignored."""
        return self.llm_engine.reset_prefix_cache()

    def get_metrics(self) -> list[Metric]:
        """Returns the engine's statistics under vLLM's names."""
        return metrics_of(
            self.client.stats(by_tier=True), config=self.config, workers=self.info.workers
        )

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Stops the engine's processes, so that all their memory is free, until wake_up().

        vLLM's arguments are ignored: weights and adapters are read from their files again.
        """
        self._engine.sleep()

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Starts the engine again after sleep(), with the adapters that it had. `tags` is ignored.

        It takes as long as a start. `client` is a new one then.
        """
        self._engine.wake_up()
        self._connect()

    if not TYPE_CHECKING:  # a type checker would find every name

        def __getattr__(self, name: str) -> Any:
            reason = f"; {INSTEAD[name]}" if name in INSTEAD else ""
            raise AttributeError(f"LLM has no attribute {name!r}{reason}")

    def shutdown(self) -> None:
        """Stops the engine's processes. Calling again does nothing."""
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

    def _run(self, batch: list[BatchRequest], use_tqdm: bool | BarFactory) -> list[RequestOutput]:
        if not self._finalizer.alive:
            raise EngineDeadError("this LLM has been shut down: make a new one")
        if self._engine.is_sleeping:
            raise EngineDeadError("this LLM sleeps: call wake_up()")
        if self._llm_engine is not None and self._llm_engine.has_unfinished_requests():
            raise ValueError("llm_engine has unfinished requests: call its step() until none")
        return self._runner.run(batch, use_tqdm)
