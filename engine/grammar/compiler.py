"""Compiles grammars in threads and keeps those used last."""

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor

from llguidance import LLMatcher

from loraplex.engine.grammar.checker import GrammarChecker, GrammarError
from loraplex.engine.grammar.matcher import describe_error
from loraplex.engine.grammar.source import parser_limits
from loraplex.engine.grammar.vocabulary_cache import VocabularyCache, vocabulary_key
from loraplex.scheduler.frontend_protocol import GrammarSpec

NUM_THREADS = 4
NUM_KEPT = 128
"""Compiled grammars that are kept for later requests."""

logger = logging.getLogger("loraplex.scheduler")


class GrammarCompiler:
    """Gives each sequence a matcher of its grammar. Threads do the work.

    Args:
        vocabularies: are made in a thread, on first use.
    """

    def __init__(self, vocabularies: VocabularyCache) -> None:
        self.vocabularies = vocabularies
        self._lock = threading.Lock()  # of `_queues`
        self._queues: dict[Hashable, deque[tuple[GrammarSpec, Future[LLMatcher]]]] = {}
        self._is_closed = False
        self._compiled: OrderedDict[Hashable, Future[LLMatcher]] = OrderedDict()
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")
        self._checkers = threading.local()
        self._all_checkers: list[GrammarChecker] = []

    def start(
        self, spec: GrammarSpec, client: Hashable, done: "Callable[[Future[LLMatcher]], None]"
    ) -> None:
        """Have `done` called, in some thread, with a future that holds the compiled matcher.

        The matcher is shared: copy it. The future's exception is a GrammarError. The grammars of
        one client are compiled one after another, so that slow ones leave threads to the others.
        """
        key = (spec.kind, spec.text, spec.is_compact, spec.whitespace, vocabulary_key(spec))
        future = self._compiled.get(key)
        if future is None:
            future = self._compiled[key] = Future()
            self._enqueue(client, spec, future)
            if len(self._compiled) > NUM_KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        future.add_done_callback(done)

    def _enqueue(self, client: Hashable, spec: GrammarSpec, future: "Future[LLMatcher]") -> None:
        with self._lock:
            queue = self._queues.setdefault(client, deque())
            queue.append((spec, future))
            is_first = len(queue) == 1
        if is_first:
            self._pool.submit(self._compile_queue, client)

    def _compile_queue(self, client: Hashable) -> None:
        """Compile the client's oldest grammar. Its others go to the end of the pool's queue."""
        queue = self._queues[client]
        spec, future = queue[0]
        try:
            future.set_result(self._compile(spec))
        except GrammarError as error:
            future.set_exception(error)
        with self._lock:
            queue.popleft()
            if not queue:
                del self._queues[client]
        if queue and not self._is_closed:
            self._pool.submit(self._compile_queue, client)

    def close(self) -> None:
        self._is_closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        for checker in self._all_checkers:
            checker.close()

    def _compile(self, spec: GrammarSpec) -> LLMatcher:
        try:
            grammar = self._checker().check(spec)
            library = self.vocabularies.of(spec).library
            matcher = LLMatcher(library, grammar, log_level=0, limits=parser_limits())
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
