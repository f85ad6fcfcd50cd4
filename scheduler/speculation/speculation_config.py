"""The settings of speculative decoding, in the JSON that vLLM's users write."""

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

METHOD: Final = "ngram"
DEFAULT_NUM_TOKENS = 15
DEFAULT_NGRAM = 3

_Positive = Annotated[int, Meta(ge=1, le=1024)]


class SpeculationConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Prompt lookup: which n-grams are looked up, and how many tokens are drafted at most."""

    method: Literal["ngram"]
    num_speculative_tokens: _Positive = DEFAULT_NUM_TOKENS
    prompt_lookup_max: _Positive | None = None
    prompt_lookup_min: _Positive | None = None

    def __post_init__(self) -> None:
        if self.shortest > self.longest:
            raise ValueError("prompt_lookup_min is above prompt_lookup_max")

    @property
    def longest(self) -> int:
        """The longest n-gram that is looked up; as in vLLM, the shortest one if only it is set."""
        return self.prompt_lookup_max or self.prompt_lookup_min or DEFAULT_NGRAM

    @property
    def shortest(self) -> int:
        return self.prompt_lookup_min or self.prompt_lookup_max or DEFAULT_NGRAM


def parse_speculation(text: str) -> SpeculationConfig | None:
    """Returns the settings that a text gives: nothing, "ngram", or a JSON object.

    Raises:
        ValueError: the text cannot be read, or names a method that there is not.
    """
    if not text:
        return None
    if text == METHOD:
        return SpeculationConfig(METHOD)
    try:
        return msgspec.json.decode(text.encode(), type=SpeculationConfig)
    except (msgspec.DecodeError, ValueError) as error:
        raise ValueError(
            f"speculative_config: {error}; it is {METHOD!r} or a JSON object such as "
            f'{{"method": "{METHOD}", "num_speculative_tokens": {DEFAULT_NUM_TOKENS}, '
            f'"prompt_lookup_max": {DEFAULT_NGRAM}}}'
        ) from None
