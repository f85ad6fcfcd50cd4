"""Messages between the scheduler and the workers. Plain data, no torch.

A *slot* is a row of the worker's persistent per-request state, ``0 <= slot < max_num_seqs``.
An *adapter slot* is a row of its table of resident adapters.
"""

from array import array
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    Int32Array = array[int]
    Int64Array = array[int]
    Float32Array = array[float]
else:

    class _ArrayType(type):
        """Makes a field type that stands for arrays of one typecode, which the codec checks."""

        def __instancecheck__(cls, value: Any) -> bool:
            return type(value) is array

    class Int32Array(metaclass=_ArrayType):
        """``array("i")``. On the wire: extension type 1 with raw little-endian items."""

        typecode, extension = "i", 1

    class Int64Array(metaclass=_ArrayType):
        """``array("q")``. On the wire: extension type 2."""

        typecode, extension = "q", 2

    class Float32Array(metaclass=_ArrayType):
        """``array("f")``. On the wire: extension type 3."""

        typecode, extension = "f", 3


class Record(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """Base of all data that crosses a process boundary: on the wire a list of its fields."""


class Message(Record, tag=True):
    """Base of the data that is sent on its own: the class name goes before the fields.

    Every such class is listed in ``engine/ipc/wire_types.py``.
    """


def int_array(values: "list[int] | tuple[int, ...]" = ()) -> "array[int]":
    return array("i", values)


class SamplingSpec(Record):
    """Sampling settings of one sequence. `seed` is always set."""

    temperature: float
    top_p: float
    top_k: int  # 0: off
    min_p: float
    seed: int  # 64 bit; with the token's position it fixes the noise, whatever the batch
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    max_tokens: int
    min_tokens: int
    stop_token_ids: Int32Array  # end-of-sequence ids included, unless the request ignores them
    num_logprobs: int  # -1: none; 0: of the sampled token alone
    num_prompt_logprobs: int  # -1: none
    bias_token_ids: Int32Array
    bias_values: Float32Array  # array('f'), as long as bias_token_ids
    # Ends of sequence that the request ignores. They too are forbidden before min_tokens.
    ignored_eos_ids: Int32Array = msgspec.field(default_factory=int_array)
    allowed_token_ids: Int32Array = msgspec.field(default_factory=int_array)  # empty: all
    # Token sequences that the answer must not contain, one after the other, and their lengths.
    bad_word_ids: Int32Array = msgspec.field(default_factory=int_array)
    bad_word_lengths: Int32Array = msgspec.field(default_factory=int_array)


class AdapterBinding(Record):
    """An adapter of a request. It applies with `weight` to all tokens from `first_position` on."""

    adapter_slot: int
    weight: float = 1.0
    first_position: int = 0


class NewRequest(Record):
    """A request whose state the worker does not hold: new, or back after a preemption."""

    slot: int
    token_ids: Int32Array  # the prompt, then what it generated before a preemption
    num_prompt_tokens: int
    page_ids: Int32Array
    bindings: list[AdapterBinding]  # empty: the base model
    sampling: SamplingSpec


class StepPlan(Message):
    """One forward step. Rows that decode come first, then rows that prefill, then rows that verify.

    Applied in this order: `freed_slots`, `new_requests`, page deltas, then the step itself.
    Row r feeds tokens `positions[r] .. positions[r] + num_tokens[r] - 1` of its request: from
    the ids in `NewRequest` or, where the position is past them, from the id that an earlier
    step sampled, which the worker keeps on the device. The step draws a token after each of the
    row's last `samples[r]` tokens: none; one, after the request's last known token; or in a row
    that verifies, one more after each draft. Drafts are the last `samples[r] - 1` tokens of a row,
    and `draft_ids` holds them.
    """

    step_id: int
    freed_slots: Int32Array
    new_requests: list[NewRequest]
    page_slots: Int32Array  # slot of each appended page; pages append in the order given
    page_ids: Int32Array
    slots: Int32Array
    positions: Int32Array
    num_tokens: Int32Array
    samples: Int32Array
    # Rows whose next tokens a grammar restricts, and for each token that they sample
    # ceil(vocabulary / 32) words: bit i % 32 of word i / 32 is 1 where token i is allowed. The
    # vocabulary is the largest one of these rows.
    masked_rows: Int32Array = msgspec.field(default_factory=int_array)
    masks: Int32Array = msgspec.field(default_factory=int_array)
    draft_ids: Int32Array = msgspec.field(default_factory=int_array)  # in the order of the rows


class TokenLogprobs(Record):
    """Log-probabilities at one position: the sampled token first, then the best ones in order."""

    token_ids: Int32Array
    logprobs: Float32Array  # array('f')
    ranks: Int32Array  # 1 is the most likely token


class PromptLogprobs(Record):
    """Log-probabilities of consecutive prompt tokens; `entries[0]` is at `first_position`."""

    slot: int
    first_position: int
    entries: list[TokenLogprobs]


NOT_FINITE = -1
"""Sampled id of a row whose logits hold a NaN or +inf, or nothing but -inf."""


class StepResult(Message):
    """Sampled ids of a step, `samples[r]` of each row r, in the order of rows and positions.

    An id that was sampled after drafts counts only if each of them equals the id before it.
    An id is NOT_FINITE where none could be sampled. The logprobs at a prompt position are NaN where
    that position's logits are not finite.
    """

    step_id: int
    token_ids: Int32Array
    logprobs: list[TokenLogprobs | None] = []  # empty: no row asks for them
    prompt_logprobs: list[PromptLogprobs] = []
    step_us: int = 0  # time the worker took for the step
    kernels: str = ""
    """How it ran, then "+" and the LoRA kernels, if any did: "graph", the whole forward a CUDA
    graph; "pieces", graphs between which attention ran eagerly; "eager"."""
    idle_us: int = 0  # for which the GPU had nothing to do between the step before and this one


class InspectAdapter(Message):
    """Read, check, hash and pack the adapter at `path`; answered by AdapterInspected."""

    name: str
    path: str


class AdapterInspected(Message):
    """`error` is empty on success. `path` echoes the question.

    `is_transient`: the files are not at fault. The worker has tried several times, and a later try
    may work.
    """

    name: str
    path: str
    error: str = ""
    content_hash: str = ""
    num_pages: int = 0
    num_bytes: int = 0  # packed, over all layers, on this rank; of a group, on all ranks
    kind: str = "lora"  # see PackedAdapter.kind
    max_rank: int = 0
    modules: list[str] = []
    warnings: list[str] = []  # parts of its folder that are not used
    is_transient: bool = False
    invocation_tokens: Int32Array = msgspec.field(default_factory=int_array)
    """An activated LoRA applies from where these begin last in a prompt. Empty: it always does."""
    num_tokens: int = 0  # the size of its vocabulary; 0: the base model's


class LoadAdapter(Message):
    """Copy an adapter's packed weights into `page_ids` and fill its table row.

    Ordered with the plans around it: plans sent later may use the slot once AdapterLoaded is in.
    """

    adapter_slot: int
    content_hash: str
    path: str  # where to read it again if the host store dropped it
    page_ids: Int32Array
    after_step: int = -1  # the last that may use the slot or the pages for what they held before


class AdapterLoaded(Message):
    adapter_slot: int
    content_hash: str
    error: str = ""
    load_us: int = 0
    from_host: bool = False  # it was in the host store when the load began
    is_transient: bool = False  # of an error: as in AdapterInspected


class UnloadAdapter(Message):
    """The slot's pages belong to others from the next message on."""

    adapter_slot: int


class DropAdapter(Message):
    """No name and no request refers to this content: free its host memory, if it has any."""

    content_hash: str


class AdapterEvicted(Message):
    """The host store has this content no more, for want of room or because it was dropped."""

    content_hash: str


class WorkerReady(Message):
    """A worker's sizes, sent once when it can take plans."""

    rank: int
    num_pages: int  # page 0 is the null page: padding writes there, no tenant owns it
    page_bytes: int  # of one layer
    num_layers: int
    max_model_len: int
    vocab_size: int
    device: str
    lora_backend: str
    attention_backend: str
    linear_backend: str = ""
    weight_bytes: int = 0  # that this rank holds of the model
    adapter_rank: int = 0
    adapter_bytes: int = 0  # pages of an adapter of this LoRA rank on all projections, all layers
    load_seconds: float = 0.0
    base_fingerprint: str = ""  # identifies the base weights in prefix-cache keys
    eos_token_ids: Int32Array = msgspec.field(default_factory=int_array)


WorkerAdapterCommand = InspectAdapter | LoadAdapter | UnloadAdapter | DropAdapter
WorkerCommand = StepPlan | WorkerAdapterCommand
WorkerEvent = WorkerReady | StepResult | AdapterInspected | AdapterLoaded | AdapterEvicted
