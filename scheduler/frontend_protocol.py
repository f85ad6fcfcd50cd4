"""Messages between the frontends and the scheduler that the scheduler itself reads and makes.

The other messages between them are in ``engine/ipc/messages/frontend.py``.
"""

from array import array
from collections.abc import Hashable, Iterator

import msgspec

from loraplex.scheduler.worker_protocol import (
    Int32Array,
    Int64Array,
    Message,
    Record,
    SamplingSpec,
    TokenLogprobs,
    int_array,
)


class AdapterSource(Record, weakref=True):
    """A PEFT folder that a client names, as it was when the frontend looked at it."""

    named: str  # absolute path as the client wrote it, which may lead through links
    path: str  # what the workers read: the real folder, or the place of tensors in memory
    stamp: str = ""  # changes whenever the adapter's files change; empty: not known
    is_from_store: bool = False  # found by its name; gives way to what the name means otherwise
    owner: str = ""  # of a store: the only tenant that may use it; empty: all may
    is_memory: bool = False  # tensors of a client, which go with the last reference to this object

    @classmethod
    def at(cls, path: str) -> "AdapterSource":
        """Returns a folder of whose files nothing is known."""
        return cls(path, path)


class MixPart(Record):
    """One adapter of a weighted mix."""

    adapter: str  # name
    weight: float = 1.0
    source: AdapterSource | None = None  # what `adapter` must be; None: what it is
    load_inplace: bool = False  # `source` may replace another folder under this name


class AdapterVocabulary(Record):
    """The token ids of an adapter that changes rows of tokens, and where its tokenizer may be."""

    key: str = ""  # names the content and the folder; empty: the base model's vocabulary
    folder: str = ""  # may hold a tokenizer; empty: the adapter came from memory
    num_tokens: int = 0  # ids that its requests may use; 0: the base model's


class GrammarSpec(Record):
    """The form that the answer of one sequence must have."""

    kind: str  # "json" (a JSON schema), "regex", "lark" or "gbnf"
    text: str
    is_compact: bool = False  # JSON without whitespace between its parts
    whitespace: str = ""  # a regex of what may stand between the parts of JSON; empty: the default
    min_tokens: int = 0  # SamplingSpec.min_tokens is 0 then: the grammar knows where it may end
    vocabulary: AdapterVocabulary | None = None
    """None: the base model's. Without a folder it has the base model's tokenizer."""


class AddRequest(Message):
    """One sequence. A client's request with n > 1 is n of these.

    The frontend chooses `request_id`; it is unique among the frontend's for its lifetime.

    A sequence that another engine has begun brings what it has generated. It goes on as if it had
    been preempted here: the same tokens follow, and only these are sent. Its prompt's
    log-probabilities were sent with its first token, so they are not computed again.
    """

    request_id: int
    prompt_token_ids: Int32Array
    sampling: SamplingSpec
    adapter: str = ""  # name of the adapter or of `mix`; empty: the base model
    adapter_source: AdapterSource | None = None  # what `adapter` must be; None: what it is
    load_inplace: bool = False  # `adapter_source` may replace another folder under this name
    salt: str = ""  # no prefix is shared between different salts
    priority: int = 0  # lower is earlier
    use_prefix_cache: bool = True
    tenant: str = ""  # who asks, as the frontend knows it; empty: the operator
    client: bytes = b""  # the connection within the frontend; empty: it may fill the queue alone
    grammar: GrammarSpec | None = None
    generated_token_ids: Int32Array = msgspec.field(default_factory=int_array)
    mix: list[MixPart] = []  # up to MAX_BINDINGS; replaces adapter_source and load_inplace
    index: int = 0  # among the sequences of the client's request, which are sent in order
    num_answers: int = 1  # sequences of the client's request
    vocabulary: str = ""  # key of the AdapterVocabulary by which the prompt was encoded

    @property
    def home_adapter(self) -> str:
        """The adapter by which a router places it: of a mix the first."""
        return self.mix[0].adapter if self.mix else self.adapter

    @property
    def parts(self) -> list[MixPart]:
        """The adapters that it asks for; empty: the base model."""
        if self.mix or not self.adapter:
            return self.mix
        return [MixPart(self.adapter, source=self.adapter_source, load_inplace=self.load_inplace)]


class SequenceOutput(Record):
    """New tokens of one sequence, or its end."""

    request_id: int
    token_ids: Int32Array
    finish_reason: str = ""  # "" while it goes on, or one of FINISH_REASONS
    stop_token_id: int = -1  # the stop token that ended it; -1: none
    error: str = ""
    error_code: str = ""
    num_cached_tokens: int = (
        0  # tokens of the prompt found in the prefix cache; with the first token
    )
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []  # from position 1 on
    queued_us: int = 0  # from the sequence's arrival to its admission; with the first token
    retry_after_s: float = 0.0  # when the client may try again; 0: not known
    vocabulary: AdapterVocabulary | None = None  # by which to encode it and send it again


class StepOutputs(Message):
    """Everything that one step brought for the sequences of one frontend.

    A sequence that got one token and nothing else is a row of the two columns. Any other sequence
    is an entry of `details`. No sequence is in both.
    """

    request_ids: Int64Array
    token_ids: Int32Array  # as long as request_ids
    details: list[SequenceOutput] = []

    def __post_init__(self) -> None:
        if len(self.request_ids) != len(self.token_ids):
            raise ValueError(
                f"{len(self.request_ids)} request ids come with {len(self.token_ids)} token ids"
            )

    def __iter__(self) -> Iterator[SequenceOutput]:
        """Every sequence as a SequenceOutput, those of the columns first."""
        for request_id, token_id in zip(self.request_ids, self.token_ids, strict=True):
            yield SequenceOutput(request_id, array("i", (token_id,)))
        yield from self.details


Outputs = list[tuple[Hashable, StepOutputs]]
"""Outputs by frontend; a frontend without outputs is not in it."""


class OutputColumns:
    """Collects the outputs for one frontend until they are taken."""

    __slots__ = ("details", "request_ids", "token_ids")

    def __init__(self) -> None:
        self.request_ids = array("q")
        self.token_ids = array("i")
        self.details: list[SequenceOutput] = []

    def take(self) -> StepOutputs | None:
        """Returns what was collected and starts anew; None if there is nothing."""
        if not self.request_ids and not self.details:
            return None
        outputs = StepOutputs(self.request_ids, self.token_ids, self.details)
        self.request_ids, self.token_ids, self.details = array("q"), array("i"), []
        return outputs


class OutputTable:
    """The OutputColumns of every frontend that has asked for something."""

    def __init__(self) -> None:
        self._columns: dict[Hashable, OutputColumns] = {}

    def of(self, frontend: Hashable) -> OutputColumns:
        columns = self._columns.get(frontend)
        if columns is None:
            columns = self._columns[frontend] = OutputColumns()
        return columns

    def add_error(
        self,
        frontend: Hashable,
        request_id: int,
        code: str,
        text: str,
        *,
        retry_after_s: float = 0.0,
        vocabulary: AdapterVocabulary | None = None,
    ) -> None:
        """Add the end of a sequence that failed; all but its id is for its client."""
        self.of(frontend).details.append(
            SequenceOutput(
                request_id,
                array("i"),
                finish_reason="error",
                error=text,
                error_code=code,
                retry_after_s=retry_after_s,
                vocabulary=vocabulary,
            )
        )

    def take(self) -> Outputs:
        """Returns what was collected since the last call."""
        return [
            (frontend, outputs)
            for frontend, columns in self._columns.items()
            if (outputs := columns.take()) is not None
        ]
