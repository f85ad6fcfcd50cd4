"""The user's sampling parameters; names and defaults are vLLM's."""

import math
from collections.abc import Sized
from dataclasses import dataclass, field, fields
from enum import StrEnum
from itertools import islice
from typing import Any

from loraplex.engine.frontend.field_checks import short
from loraplex.engine.frontend.structured.structured_outputs import StructuredOutputsParams

MAX_LOGPROBS = 128
MAX_STOP_STRINGS = 128
MAX_STOP_CHARS = 4096  # all together: each token may cost the square of the longest
MAX_STOP_TOKEN_IDS = 4096
MAX_BIASES = 4096
MAX_ALLOWED_TOKEN_IDS = 1 << 16
MAX_BAD_WORDS = 1024
MAX_BAD_CHARS = 16384  # all bad words together
MAX_BIAS = 1e30  # a logit and its bias stay finite in 32 bits
MAX_LOGPROBS_A_STEP = 4096  # n * (logprobs + 1): entries that a step adds to one reply

_MENDS = {
    "logits_processors": "use logit_bias, allowed_token_ids, bad_words or structured_outputs",
    "guided_decoding": "use structured_outputs",
    "use_beam_search": "use LLM.beam_search",
    "best_of": "use n",
    "truncate_prompt_tokens": "shorten the prompt",
    "extra_args": "leave it out",
    "spaces_between_special_tokens": "leave it out",
}
"""Says what to do about parameters of vLLM that are not known."""

_FLOATS = (
    "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "min_p",
)  # fmt: skip
_BOOLS = ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output")


class RequestOutputKind(StrEnum):
    """Selects what each output of a request holds; the names are vLLM's."""

    CUMULATIVE = "cumulative"
    """Everything generated so far."""
    DELTA = "delta"
    """The text, token ids and logprobs that are new since the last output."""
    FINAL_ONLY = "final_only"
    """Everything, in one output at the end."""


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    """Selects how the tokens of one request are sampled, when it ends and what it returns.

    Raises:
        ValueError: a value is out of range; the message names it.
        TypeError: a field is unknown or of the wrong type.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None  # -1 also means None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] | None = field(default=None)
    allowed_token_ids: list[int] | None = None  # None: all
    bad_words: list[str] | None = None  # texts that no answer contains
    structured_outputs: StructuredOutputsParams | None = None  # or a map of its fields
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __new__(cls, *args: Any, **values: Any) -> "SamplingParams":
        """Says what to do where the constructor would only say that it does not know a name."""
        for name in values.keys() & _MENDS.keys():
            raise TypeError(f"SamplingParams has no {name}: {_MENDS[name]}")
        return object.__new__(cls)

    def __post_init__(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is True:
                setattr(self, name, 1)
        if isinstance(self.structured_outputs, dict):
            self.structured_outputs = StructuredOutputsParams.from_wire(self.structured_outputs)
        self._check_types()
        if self.seed == -1:
            self.seed = None
        self._check_ranges()

    @property
    def stop_strings(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)

    @classmethod
    def from_wire(cls, values: dict[str, Any]) -> "SamplingParams":
        """Builds the parameters from a decoded message.

        Raises:
            ValueError, TypeError: as the constructor; an unknown name lists the known ones.
        """
        if not isinstance(values, dict):
            raise TypeError("sampling_params must be a map")
        known = {f.name for f in fields(cls)}
        unknown = list(islice((short(k) for k in values if k not in known), 5))
        if unknown:
            raise ValueError(
                f"unknown sampling parameters {', '.join(unknown)}; known: {sorted(known)}"
            )
        values = dict(values)
        bias = values.get("logit_bias")
        if isinstance(bias, dict):  # JSON and some MessagePack writers make integer keys text
            _check_count("logit_bias", bias, MAX_BIASES)
            try:
                values["logit_bias"] = {int(k): v for k, v in bias.items()}
            except (TypeError, ValueError):
                raise ValueError("logit_bias must have token ids as keys") from None
        return cls(**values)

    def to_wire(self) -> dict[str, Any]:
        """Returns the fields that differ from their defaults."""
        default = SamplingParams()
        values = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if getattr(self, f.name) != getattr(default, f.name)
        }
        if self.structured_outputs is not None:
            values["structured_outputs"] = self.structured_outputs.to_wire()
        return values

    def _check_types(self) -> None:
        for name in _FLOATS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {short(value)}")
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
            setattr(self, name, float(value))
        for name in ("n", "top_k", "min_tokens"):
            _check_int(name, getattr(self, name))
        for name in ("seed", "max_tokens", "logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name))
        for name in _BOOLS:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {short(getattr(self, name))}")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        _check_texts("stop", stop, MAX_STOP_STRINGS, MAX_STOP_CHARS)
        _check_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)
        _check_ids("allowed_token_ids", self.allowed_token_ids, MAX_ALLOWED_TOKEN_IDS)
        _check_texts("bad_words", self.bad_words, MAX_BAD_WORDS, MAX_BAD_CHARS)
        structured = self.structured_outputs
        if structured is not None and not isinstance(structured, StructuredOutputsParams):
            raise TypeError(
                "structured_outputs must be StructuredOutputsParams or a map of its fields, got "
                f"{short(structured)}"
            )
        _check_bias(self.logit_bias)
        self.output_kind = _output_kind(self.output_kind)

    def _check_ranges(self) -> None:
        def require(ok: bool, text: str) -> None:
            if not ok:
                raise ValueError(text)

        require(1 <= self.n <= 256, f"n must lie in [1, 256], got {self.n}")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            require(-2.0 <= value <= 2.0, f"{name} must lie in [-2, 2], got {value}")
        require(
            self.repetition_penalty > 0.0,
            f"repetition_penalty must be positive, got {self.repetition_penalty}",
        )
        require(
            0.0 <= self.temperature <= 100.0,
            f"temperature must lie in [0, 100], got {self.temperature}",
        )
        require(0.0 < self.top_p <= 1.0, f"top_p must lie in (0, 1], got {self.top_p}")
        require(
            self.seed is None or self.seed >= 0,
            f"seed must not be negative, got {self.seed}: leave it out, or give -1 or None, "
            "for a different answer each time",
        )
        require(self.top_k >= -1, f"top_k must be -1 or 0 (off) or positive, got {self.top_k}")
        require(0.0 <= self.min_p <= 1.0, f"min_p must lie in [0, 1], got {self.min_p}")
        require(
            self.max_tokens is None or self.max_tokens >= 1,
            f"max_tokens must be at least 1, got {self.max_tokens}",
        )
        require(self.min_tokens >= 0, f"min_tokens must not be negative, got {self.min_tokens}")
        require(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            f"min_tokens ({self.min_tokens}) exceeds max_tokens ({self.max_tokens})",
        )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            require(
                value is None or 0 <= value <= MAX_LOGPROBS,
                f"{name} must lie in [0, {MAX_LOGPROBS}], got {value}",
            )
        require(
            self.n * (1 + (self.logprobs or 0)) <= MAX_LOGPROBS_A_STEP,
            f"n * (logprobs + 1) must not exceed {MAX_LOGPROBS_A_STEP}: lower n or logprobs",
        )
        require(
            self.allowed_token_ids is None or len(self.allowed_token_ids) > 0,
            "allowed_token_ids must not be empty: leave it out to allow all",
        )
        require(
            self.structured_outputs is None or not self.ignore_eos,
            "structured_outputs ends an answer with an end of sequence: leave out ignore_eos",
        )
        require(all(self.stop_strings), "stop strings must not be empty")
        require(all(self.bad_words or ()), "bad_words must not be empty")
        require(
            self.detokenize or not self.stop_strings,
            "stop strings are found in text: set detokenize=True, or leave out stop",
        )


def _check_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {short(value)}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit 64 bits, got {value}")


def _check_ids(name: str, token_ids: object, limit: int) -> None:
    if token_ids is None:
        return
    if not isinstance(token_ids, list | tuple):
        raise TypeError(f"{name} must be a list of integers")
    _check_count(name, token_ids, limit)
    for token in token_ids:
        _check_int(name, token)


def _check_count(name: str, values: Sized, limit: int) -> None:
    if len(values) > limit:
        raise ValueError(f"{name} must have at most {limit} entries, got {len(values)}")


def _output_kind(value: Any) -> RequestOutputKind:
    if not isinstance(value, str) or value not in list(RequestOutputKind):
        known = ", ".join(RequestOutputKind)
        raise ValueError(f"output_kind must be one of {known}, got {short(value)}")
    return RequestOutputKind(value)


def _check_texts(name: str, texts: object, max_texts: int, max_chars: int) -> None:
    if texts is None:
        return
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be a list of strings")
    _check_count(name, texts, max_texts)
    if sum(map(len, texts)) > max_chars:
        raise ValueError(f"{name} must have at most {max_chars} characters in all")


def _check_bias(bias: object) -> None:
    if bias is None:
        return
    if not isinstance(bias, dict):
        raise TypeError("logit_bias must map token ids to numbers")
    _check_count("logit_bias", bias, MAX_BIASES)
    for token, value in bias.items():
        _check_int("logit_bias key", token)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not value <= MAX_BIAS:
            raise ValueError(
                f"logit_bias must map token ids to numbers up to {MAX_BIAS} (-inf removes a "
                f"token), got {short(value)}"
            )
