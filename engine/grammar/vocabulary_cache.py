"""Keeps the vocabularies of grammars: the base model's and those of adapters."""

import threading
from collections import OrderedDict
from collections.abc import Callable

from loraplex.engine.grammar.vocabulary import Vocabulary
from loraplex.scheduler.frontend_protocol import AdapterVocabulary, GrammarSpec

MAX_KEPT = 8
"""Vocabularies that are kept; one may take 100 MB."""


def vocabulary_key(spec: GrammarSpec) -> str:
    """Returns what tells the vocabularies of grammars apart; empty: the base model's."""
    return spec.vocabulary.key if spec.vocabulary is not None else ""


class VocabularyCache:
    """Makes each vocabulary on first use. Any thread may call it."""

    def __init__(self, make: Callable[[AdapterVocabulary | None], Vocabulary]) -> None:
        """`make` takes GrammarSpec.vocabulary."""
        self._make = make
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Vocabulary] = OrderedDict()

    def of(self, spec: GrammarSpec) -> Vocabulary:
        """Returns the vocabulary of a grammar."""
        key = vocabulary_key(spec)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._make(spec.vocabulary)
                if len(self._kept) > MAX_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]
