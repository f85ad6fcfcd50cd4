"""Compiles grammars in threads and keeps those used last."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from llguidance import LLMatcher
from msgspec.structs import replace

from loraplex.engine.grammar.checker import GrammarChecker, GrammarError
from loraplex.engine.grammar.matcher import describe_error
from loraplex.engine.grammar.source import parser_limits
from loraplex.engine.grammar.vocabulary import Vocabulary
from loraplex.scheduler.frontend_protocol import GrammarSpec

NUM_THREADS = 4
NUM_KEPT = 128
"""Compiled grammars that are kept for later requests."""

logger = logging.getLogger("loraplex.scheduler")


class GrammarCompiler:
    """Gives each sequence a matcher of its grammar. Threads do the work.

    Args:
        vocabulary: makes the vocabulary; called once, in a thread, on first use.
    """

    def __init__(self, vocabulary: Callable[[], Vocabulary]) -> None:
        self._make_vocabulary = vocabulary
        self._vocabulary: Vocabulary | None = None
        self._lock = threading.Lock()
        self._compiled: OrderedDict[GrammarSpec, Future[LLMatcher]] = OrderedDict()
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")
        self._checkers = threading.local()
        self._all_checkers: list[GrammarChecker] = []

    def start(self, spec: GrammarSpec, done: "Callable[[Future[LLMatcher]], None]") -> None:
        """Have `done` called, in some thread, with a future that holds the compiled matcher.

        The matcher is shared: copy it. The future's exception is a GrammarError.
        """
        key = replace(spec, min_tokens=0)
        future = self._compiled.get(key)
        if future is None or (future.done() and future.exception() is not None):
            future = self._compiled[key] = self._pool.submit(self._compile, key)
            if len(self._compiled) > NUM_KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        future.add_done_callback(done)

    @property
    def vocabulary(self) -> Vocabulary:
        """Returns the vocabulary. The first call makes it."""
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._make_vocabulary()
            return self._vocabulary

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for checker in self._all_checkers:
            checker.close()

    def _compile(self, spec: GrammarSpec) -> LLMatcher:
        try:
            grammar = self._checker().check(spec)
            matcher = LLMatcher(
                self.vocabulary.library, grammar, log_level=0, limits=parser_limits()
            )
        except GrammarError:
            raise
        except Exception:
            logger.exception("a grammar could not be compiled")
            raise GrammarError("the grammar cannot be compiled: see the server's log") from None
        if matcher.is_error():
            raise GrammarError(f"the grammar cannot be compiled: {matcher.get_error()}")
        return matcher

    def _checker(self) -> GrammarChecker:
        checker: GrammarChecker | None = getattr(self._checkers, "own", None)
        if checker is None:
            checker = self._checkers.own = GrammarChecker()
            self._all_checkers.append(checker)
        return checker


def error_text(error: BaseException) -> str:
    """Returns the error of a compiled future, for the client."""
    return f"structured_outputs: {describe_error(str(error))}"
