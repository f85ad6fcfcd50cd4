"""One request of a client, from its message to its last output."""

from array import array
from dataclasses import dataclass, field, replace

from loraplex.engine.errors import ClientError, client_error
from loraplex.engine.frontend.inputs import OutsideVocabularyError
from loraplex.engine.frontend.limits.prompt_budget import prompt_bytes
from loraplex.engine.frontend.outputs import OutputProcessor
from loraplex.engine.frontend.protocol import GenerateRequest
from loraplex.engine.frontend.request_log import RequestTimes
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.engine.frontend.vocabularies.request_vocabulary import RequestVocabulary
from loraplex.engine.frontend.vocabularies.vocabulary_table import ASK, adapter_of
from loraplex.engine.stores.adapter_store import FolderLeases
from loraplex.scheduler.frontend_protocol import GrammarSpec
from loraplex.scheduler.worker_protocol import SamplingSpec

MAX_ENCODED = 4
"""Times that a request is encoded before its adapter is said to be replaced again and again."""


@dataclass(slots=True, eq=False)
class UnfinishedRequest:
    """A request.

    Attributes:
        message: keeps the prompt of an adapter's request until its first token: the scheduler may
            want it encoded by another vocabulary, or be asked first by which.
        payer: whose byte budgets it counts on: its tenant's, or else its client's.
        num_chars: of the prompt, as inputs.num_chars() counts.
        outputs: None until the prompt is tokenized; sequence i has the id `first_id + i`.
        num_bytes: that the budget for prompts counts.
        leases: of the adapters' files.
    """

    client: bytes
    message: GenerateRequest
    seed: int
    payer: bytes
    num_chars: int
    vocabulary: RequestVocabulary
    outputs: OutputProcessor | None = None
    first_id: int = 0
    num_bytes: int = 0
    times: RequestTimes = field(default_factory=RequestTimes)
    leases: FolderLeases = field(default_factory=FolderLeases)
    _is_asking: bool = False
    _num_told: int = 0

    @property
    def has_begun(self) -> bool:
        """Tells whether an answer has tokens."""
        return self.outputs is not None and any(c.num_tokens for c in self.outputs.completions)

    @property
    def keeps_prompt(self) -> bool:
        return bool(adapter_of(self.message)) and not self.has_begun

    @property
    def vocabulary_key(self) -> str:
        """AddRequest.vocabulary."""
        return ASK if self._is_asking else self.vocabulary.key

    def ask(self) -> bool:
        """Makes it a question for its adapter's vocabulary. Returns whether that may help: it names
        an adapter, whose vocabulary was not told yet."""
        self._is_asking = bool(adapter_of(self.message)) and not self._num_told
        return self._is_asking

    def may_learn(self) -> bool:
        """Counts that its vocabulary was told. Returns whether it can be encoded once more: the
        client has no token, and the adapter is not replaced again and again."""
        self._num_told += 1
        return not self.has_begun and self._num_told < MAX_ENCODED

    def learn(self, found: RequestVocabulary | ClientError) -> None:
        """Takes the vocabulary by which it must be encoded now. Raises ClientError if the adapter's
        cannot be used."""
        if isinstance(found, ClientError):
            raise client_error(found.code, f"adapter {self.message.adapter_label!r}: {found}")
        self.vocabulary, self.outputs, self._is_asking = found, None, False

    def needed_bytes(self, num_tokens: int) -> int:
        """Returns the bytes that it holds with a prompt of so many tokens."""
        num_bytes = prompt_bytes(self.message.sampling_params, num_tokens)
        return num_bytes + self.num_chars if self.keeps_prompt else num_bytes

    def forget_prompt(self) -> int:
        """Returns the bytes that `num_bytes` no longer counts."""
        num_bytes = self.num_chars if self.keeps_prompt else 0
        self.num_bytes -= num_bytes
        self.message = replace(
            self.message, prompt=None, messages=None, prompt_token_ids=array("i")
        )
        return num_bytes

    def sampling(self, num_tokens: int) -> tuple[list[SamplingSpec], GrammarSpec | None]:
        """Returns what the scheduler needs for each answer; any values if the request asks.

        Raises ClientError if the parameters do not fit the prompt's tokens or the vocabulary.
        """
        inputs, params = self.vocabulary.inputs, self.message.sampling_params
        if not self._is_asking:
            try:
                specs = inputs.sampling_specs(params, num_tokens, self.seed)
                return specs, inputs.grammar(params)
            except OutsideVocabularyError:
                if not self.ask():
                    raise
        return inputs.sampling_specs(SamplingParams(), num_tokens, self.seed), None
