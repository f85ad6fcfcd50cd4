"""Knows by which vocabulary the requests of each adapter are encoded.

The scheduler alone knows what an adapter's name means, and what its files hold. So a request is
encoded by the vocabulary that its adapter had last, at first by the base model's. If that was wrong
the scheduler refuses the request and says which vocabulary it needs. Requests of adapters without
token rows thus cost nothing more.
"""

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from msgspec.structs import replace

from loraplex.engine.adapters.open_file import file_reader
from loraplex.engine.checkpoint.locate import resolve_model
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ClientError, ConfigError, client_error
from loraplex.engine.frontend.inputs import InputProcessor, TextCodec
from loraplex.engine.frontend.outputs import OutputFactory
from loraplex.engine.frontend.protocol import GenerateRequest
from loraplex.engine.frontend.vocabularies.last_used import LastUsed
from loraplex.engine.frontend.vocabularies.request_vocabulary import RequestVocabulary
from loraplex.engine.ipc.channel import Wakeup
from loraplex.engine.stores.open_stores import adapter_roots
from loraplex.engine.tokenizer.adapter_tokenizer import check_extends, load_adapter_tokenizer
from loraplex.engine.tokenizer.tokenizer import Tokenizer
from loraplex.scheduler.frontend_protocol import AdapterVocabulary

ASK = "?"
"""The key of no vocabulary: the scheduler answers with the one that the adapter has."""

MAX_NAMES = 10_000
MAX_TOKENIZERS = 16
"""Tokenizers of adapters that are kept; one may take 100 MB."""

Found = RequestVocabulary | ClientError
Then = Callable[[Found], None]

logger = logging.getLogger("loraplex.frontend")


class VocabularyTable:
    """Belongs to one frontend, whose thread calls all methods.

    Attributes:
        base: the base model's vocabulary.
    """

    def __init__(
        self, config: EngineConfig, inputs: InputProcessor, codec: TextCodec | None, wakeup: Wakeup
    ) -> None:
        """`wakeup` is set when run_ready() has something to do."""
        self.base = RequestVocabulary("", inputs, OutputFactory(codec))
        self._config = config.model
        self._roots = adapter_roots(config)
        self._codec = codec
        self._wakeup = wakeup
        self._key_of = LastUsed[str](MAX_NAMES)  # by tenant and adapter
        self._tokenizers = LastUsed[Found](MAX_TOKENIZERS)  # the vocabularies that have one, by key
        self._others = LastUsed[Found](MAX_NAMES)
        self._asked: dict[str, list[Then]] = {}  # by key
        self._loaded: deque[tuple[str, Found]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapter-tokenizer")

    def guess(self, message: GenerateRequest) -> RequestVocabulary:
        """Returns the vocabulary that the message's adapter had last."""
        key = self._key_of.get((message.tenant, adapter_of(message)))
        known = self._find(key) if key else None
        return known if isinstance(known, RequestVocabulary) else self.base

    def learn(self, message: GenerateRequest, told: AdapterVocabulary, then: Then) -> None:
        """Calls `then`, now or in run_ready(), with the vocabulary that the scheduler has told, or
        with the reason why the adapter's tokenizer cannot be used."""
        self._key_of.keep((message.tenant, adapter_of(message)), told.key)
        if not told.key:
            then(self.base)
        elif (found := self._find(told.key)) is not None:
            then(found)
        elif told.key in self._asked:
            self._asked[told.key].append(then)
        else:
            self._asked[told.key] = [then]
            self._thread.submit(self._load, told)

    def run_ready(self) -> None:
        """Hands out the vocabularies that were loaded."""
        while self._loaded:
            key, found = self._loaded.popleft()
            has_tokenizer = isinstance(found, RequestVocabulary) and found.has_tokenizer
            (self._tokenizers if has_tokenizer else self._others).keep(key, found)
            for then in self._asked.pop(key):
                then(found)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _find(self, key: str) -> Found | None:
        return self._tokenizers.get(key) or self._others.get(key)

    def _load(self, told: AdapterVocabulary) -> None:
        found: Found
        try:
            found = self._make(told)
        except (ConfigError, OSError, ValueError) as error:
            found = client_error("adapter", str(error))
        except BaseException as error:  # PanicException of the tokenizers library is no Exception
            logger.exception("the tokenizer of an adapter cannot be read")
            found = client_error("adapter", f"its tokenizer cannot be read: {error}")
        self._loaded.append((told.key, found))
        self._wakeup.set()

    def _make(self, told: AdapterVocabulary) -> RequestVocabulary:
        num_tokens = told.num_tokens or self.base.inputs.num_tokens
        base, own = self._codec, self._load_codec(told, num_tokens)
        if own is not None:
            inputs = self.base.inputs.for_adapter(own, told)
            return RequestVocabulary(told.key, inputs, OutputFactory(own), has_tokenizer=True)
        if base is not None and num_tokens < base.tokenizer.vocab_size:
            self._has_added(base.tokenizer, num_tokens)  # refuses tokens without rows
        inputs = self.base.inputs.for_adapter(base, replace(told, folder=""))
        return RequestVocabulary(told.key, inputs, self.base.outputs)

    def _load_codec(self, told: AdapterVocabulary, num_tokens: int) -> TextCodec | None:
        """Returns the adapter's own codec, None if it brings none or the base model's tokens."""
        if self._codec is None or not told.folder:
            return None
        base, config = self._codec, self._config
        base_path = Path(config.tokenizer or resolve_model(config.model)).expanduser()
        folder = Path(told.folder)
        own = load_adapter_tokenizer(folder, base_path, file_reader(folder, self._roots))
        if own is None:
            return None
        if not self._has_added(own, num_tokens):
            return None
        if own.chat_template is None and base.tokenizer.chat_template is not None:
            own.set_chat_template(base.tokenizer.chat_template)
        return TextCodec(own, own.compiled_template())

    def _has_added(self, own: Tokenizer, num_tokens: int) -> bool:
        assert self._codec is not None
        return check_extends(
            own,
            self._codec.tokenizer,
            num_rows=num_tokens,
            num_base_rows=self.base.inputs.num_tokens,
        )


def adapter_of(message: GenerateRequest) -> str:
    """Returns the name of a message's only adapter, "" if there is none or a mix."""
    if message.adapters:
        return message.adapters[0].name if len(message.adapters) == 1 else ""
    return message.adapter
