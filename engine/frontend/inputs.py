"""Turns a checked client message into token ids and sampling specs for the scheduler."""

import copy
import hashlib
import logging
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from loraplex.engine.checkpoint.locate import resolve_model
from loraplex.engine.config import EngineConfig, ModelConfig
from loraplex.engine.errors import ClientError, client_error
from loraplex.engine.frontend.protocol import GenerateRequest
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.engine.frontend.structured.bad_words import encode_bad_words
from loraplex.engine.ipc.messages.frontend import EngineInfo
from loraplex.engine.tokenizer.loading import load_tokenizer
from loraplex.engine.tokenizer.tokenizer import Tokenizer
from loraplex.scheduler.frontend_protocol import AdapterVocabulary, GrammarSpec
from loraplex.scheduler.worker_protocol import SamplingSpec, int_array

if TYPE_CHECKING:
    from loraplex.engine.tokenizer.chat_template import ChatTemplate

MAX_COPIED_TOKENS = 1 << 22  # prompt tokens of all n sequences of a request
MAX_PROMPT_LOGPROBS = 1 << 17  # entries in one reply; each takes some 10 us and 30 bytes
MAX_CHAT_ENTRIES = 1 << 16  # some 50 ms in which no other client is served
ENTRY_CHARS = 4  # a list or map costs a template about as much as so many characters
MIN_TEMPERATURE = 0.01
"""Smaller temperatures count as this one, as in vLLM. 0 is greedy."""

logger = logging.getLogger("loraplex.frontend")


@dataclass(frozen=True, slots=True)
class TextCodec:
    """A tokenizer, and the chat template of the model if it has one."""

    tokenizer: Tokenizer
    chat_template: "ChatTemplate | None"


def load_text_codec(config: ModelConfig) -> TextCodec | None:
    """Loads the tokenizer and chat template that the configuration names, or the model's own.

    Returns None if the configuration wants no tokenizer.

    Raises:
        ConfigError: a file is missing or cannot be used.
    """
    if config.skip_tokenizer_init:
        return None
    path = resolve_model(config.model)
    tokenizer = load_tokenizer(path, config.tokenizer, config.chat_template)
    return TextCodec(tokenizer, tokenizer.compiled_template())


class OutsideVocabularyError(ClientError):
    """A request names a token id that its vocabulary lacks."""


class InputProcessor:
    """Validates and tokenizes requests. `tokenize` may run in any thread.

    Attributes:
        num_tokens: ids that a request may use.
    """

    def __init__(
        self, config: EngineConfig, info: EngineInfo, codec: TextCodec | None, seed_salt: str
    ) -> None:
        """`seed_salt` makes the default seeds of an engine's frontends differ."""
        self._info = info
        self._seed_salt = f"{config.model.seed}:{seed_salt}"
        self._num_seeds = 0
        self._set_vocabulary(codec)

    def for_adapter(
        self, codec: TextCodec | None, vocabulary: AdapterVocabulary
    ) -> "InputProcessor":
        """Returns the processor for requests of an adapter with its own vocabulary.

        Args:
            vocabulary: has no folder if the adapter brings no tokenizer.
        """
        other = copy.copy(self)
        other._set_vocabulary(codec, vocabulary)
        return other

    def _set_vocabulary(
        self, codec: TextCodec | None, vocabulary: AdapterVocabulary | None = None
    ) -> None:
        self._codec = codec
        self._vocabulary = vocabulary
        self.num_tokens = (vocabulary and vocabulary.num_tokens) or self._info.vocab_size
        self._eos_token_ids = {i for worker in self._info.workers for i in worker.eos_token_ids}
        if codec is not None:
            self._eos_token_ids.update(codec.tokenizer.eos_token_ids)
        self._bad_words = lru_cache(maxsize=64)(self._encode_bad_words)

    def tokenize(self, message: GenerateRequest) -> "array[int]":
        """Returns the prompt's token ids as int32.

        Raises:
            ClientError: the prompt is empty, too long, has unknown ids or cannot be encoded.
        """
        token_ids = message.prompt_token_ids
        if token_ids is None:
            token_ids = array("i", self.encode(message))
        if not token_ids:
            raise ClientError("the prompt is empty: send at least one token")
        limit = self._info.max_model_len
        if len(token_ids) >= limit:
            raise client_error(
                "prompt_too_long",
                f"the prompt has {len(token_ids)} tokens; max_model_len is {limit} for prompt and "
                "answer together: shorten the prompt",
            )
        self._check_token_ids("", (min(token_ids), max(token_ids)))
        return token_ids

    def try_tokenize(self, message: GenerateRequest) -> "array[int] | ClientError":
        """Returns the prompt's token ids, or the error that tokenize() raised."""
        try:
            return self.tokenize(message)
        except ClientError as error:
            return error
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # PanicException of the tokenizers library is no Exception
            logger.exception("tokenizing failed")
            return client_error("internal", "the prompt cannot be encoded: see the server's log")

    def encode(self, message: GenerateRequest) -> list[int]:
        """Returns the token ids of the message's text or chat, which may be too many to serve.

        Raises:
            ClientError: there is no tokenizer, the chat template refuses the messages, or the text
                is longer than `max_model_len` tokens can be.
        """
        template = self._text_codec().chat_template
        try:
            if message.messages is None:
                return self.encode_text(message.prompt or "")
            if template is None:
                raise ClientError(
                    "the model has no chat template: send a prompt, or start the server with "
                    "--chat-template"
                )
            options: dict[str, Any] = {
                "add_generation_prompt": message.add_generation_prompt,
                "continue_final_message": message.continue_final_message,
                "tools": message.tools,
                "documents": message.documents,
            }
            text = template.render(message.messages, **(options | message.chat_template_kwargs))
            return self.encode_text(text, add_special_tokens=False)
        except ClientError:
            raise
        except Exception as error:  # a template can raise any exception
            raise ClientError(f"the prompt cannot be encoded: {error}") from None

    def encode_text(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the token ids of a text; raises ClientError as encode()."""
        tokenizer = self._text_codec().tokenizer
        self._check_num_chars(tokenizer, text)
        return tokenizer.encode(text, add_special_tokens)

    def _text_codec(self) -> TextCodec:
        if self._codec is None:
            raise ClientError(
                "this server runs without a tokenizer (skip_tokenizer_init): "
                "send prompt_token_ids instead of text"
            )
        return self._codec

    def _check_num_chars(self, tokenizer: Tokenizer, text: str) -> None:
        """Refuses a text that is too long whatever its tokens are, before they are counted."""
        limit = self._info.max_model_len * tokenizer.max_token_chars
        if len(text) > limit:
            raise client_error(
                "prompt_too_long",
                f"the prompt has {len(text)} characters, more than max_model_len "
                f"({self._info.max_model_len}) tokens can hold: shorten the prompt",
            )

    def sampling_specs(
        self, params: SamplingParams, num_prompt_tokens: int, seed: int | None = None
    ) -> list[SamplingSpec]:
        """Returns one spec for each of the n sequences.

        They differ in their seeds, and only the first asks for prompt logprobs. `seed` is the
        first one's, seed_of() now if it is None.
        """
        _check_cost(params, num_prompt_tokens)
        vocab_size = self.num_tokens
        bias = params.logit_bias or {}
        self._check_token_ids("logit_bias: ", bias)
        self._check_token_ids("stop_token_ids: ", params.stop_token_ids or ())
        self._check_token_ids("allowed_token_ids: ", params.allowed_token_ids or ())
        room = self._info.max_model_len - num_prompt_tokens
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        stop = set(params.stop_token_ids or ())
        if not params.ignore_eos:
            stop.update(self._eos_token_ids)
        greedy = params.temperature == 0.0
        bad_words = self._bad_words(tuple(params.bad_words)) if params.bad_words else []
        first = SamplingSpec(
            temperature=0.0 if greedy else max(params.temperature, MIN_TEMPERATURE),
            top_p=1.0 if greedy else params.top_p,
            top_k=0 if greedy else max(0, min(params.top_k, vocab_size)),
            min_p=0.0 if greedy else params.min_p,
            seed=self.seed_of(params) if seed is None else seed,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            max_tokens=max_tokens,
            min_tokens=0 if params.structured_outputs else min(params.min_tokens, max_tokens),
            stop_token_ids=int_array(sorted(stop)),
            ignored_eos_ids=int_array(sorted(self._eos_token_ids - stop)),
            num_logprobs=-1 if params.logprobs is None else min(params.logprobs, vocab_size),
            num_prompt_logprobs=(
                -1 if params.prompt_logprobs is None else min(params.prompt_logprobs, vocab_size)
            ),
            bias_token_ids=int_array(list(bias)),
            bias_values=array("f", bias.values()),
            allowed_token_ids=int_array(params.allowed_token_ids or ()),
            bad_word_ids=int_array(list(chain.from_iterable(bad_words))),
            bad_word_lengths=int_array([len(word) for word in bad_words]),
        )
        others = [
            replace(first, seed=_hash63(f"{first.seed}:{i}"), num_prompt_logprobs=-1)
            for i in range(1, params.n)
        ]
        return [first, *others]

    def grammar(self, params: SamplingParams) -> GrammarSpec | None:
        """Returns the form that each of the n answers must have, None if any will do.

        Raises:
            ClientError: the engine has no tokenizer, or nothing could end the answer.
        """
        if params.structured_outputs is None:
            return None
        if self._codec is None:
            raise ClientError(
                "structured_outputs needs a tokenizer, but this server runs without one "
                "(skip_tokenizer_init)"
            )
        if not self._eos_token_ids and not params.stop_token_ids:
            raise ClientError(
                "structured_outputs needs an end of sequence, and the model has none: set "
                "stop_token_ids"
            )
        grammar = params.structured_outputs.to_grammar(params.min_tokens)
        return replace(grammar, vocabulary=self._vocabulary)

    def _encode_bad_words(self, words: tuple[str, ...]) -> list[list[int]]:
        if self._codec is None:
            raise ClientError(
                "bad_words needs a tokenizer, but this server runs without one "
                "(skip_tokenizer_init): use logit_bias"
            )
        sequences = encode_bad_words(self._codec.tokenizer, words)
        return [ids for ids in sequences if max(ids) < self.num_tokens]  # others never occur

    def _check_token_ids(self, head: str, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self.num_tokens:
                raise OutsideVocabularyError(
                    f"{head}token id {token_id} is outside the vocabulary of {self.num_tokens}"
                )

    def seed_of(self, params: SamplingParams) -> int:
        """Returns the seed of a request that arrives now. Call it in order of arrival.

        Requests without a seed are numbered, so the same requests get the same seeds.
        """
        if params.seed is not None:
            return params.seed
        self._num_seeds += 1
        return _hash63(f"{self._seed_salt}:{self._num_seeds}")


def _check_cost(params: SamplingParams, num_prompt_tokens: int) -> None:
    if params.n * num_prompt_tokens > MAX_COPIED_TOKENS:
        raise ClientError(
            f"n ({params.n}) times the prompt's {num_prompt_tokens} tokens exceeds "
            f"{MAX_COPIED_TOKENS}: lower n, or send several requests"
        )
    num_entries = num_prompt_tokens * (1 + (params.prompt_logprobs or 0))
    if params.prompt_logprobs is not None and num_entries > MAX_PROMPT_LOGPROBS:
        raise ClientError(
            f"prompt_logprobs={params.prompt_logprobs} of {num_prompt_tokens} prompt tokens are "
            f"{num_entries} entries, more than {MAX_PROMPT_LOGPROBS}: lower prompt_logprobs or "
            "shorten the prompt"
        )


def _hash63(text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


def num_chars(message: GenerateRequest) -> int:
    """Returns the length of the prompt's text; for a chat, of every text and entry in it.

    Raises:
        ClientError: a chat has more than MAX_CHAT_ENTRIES.
    """
    if message.prompt is not None:
        return len(message.prompt)
    parts = (message.messages, message.tools, message.documents, message.chat_template_kwargs)
    return _chars_in([part for part in parts if part])


def _chars_in(value: Any) -> int:
    """Counts the characters that a chat template may read; an entry costs as much as some."""
    total, num_entries, stack = 0, 0, [value]
    while stack:
        item = stack.pop()
        num_entries += 1
        if num_entries > MAX_CHAT_ENTRIES:
            raise client_error(
                "too_large",
                f"the chat has more than {MAX_CHAT_ENTRIES} texts, numbers, lists and maps, its "
                "tools and documents included: send less at once",
            )
        total += len(item) if isinstance(item, str) else ENTRY_CHARS
        if isinstance(item, dict):
            stack += item.keys()
            stack += item.values()
        elif isinstance(item, list):
            stack += item
    return total
