"""The tokens of a request: the base model's, or those of its adapter."""

from dataclasses import dataclass

from loraplex.engine.frontend.inputs import InputProcessor
from loraplex.engine.frontend.outputs import OutputFactory


@dataclass(frozen=True, slots=True)
class RequestVocabulary:
    """Encodes, checks and decodes the requests of one vocabulary.

    Attributes:
        key: of the AdapterVocabulary; empty: the base model's.
        has_tokenizer: the adapter brings its own.
    """

    key: str
    inputs: InputProcessor
    outputs: OutputFactory
    has_tokenizer: bool = False
