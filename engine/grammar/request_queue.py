"""Requests whose grammars are being compiled, before the scheduler gets them."""

from array import array
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from llguidance import LLMatcher

from loraplex.engine.grammar.compiler import GrammarCompiler, error_text
from loraplex.engine.grammar.mask_computer import MaskComputer, MaskTask
from loraplex.engine.grammar.matcher import GrammarMatcher
from loraplex.engine.grammar.vocabulary_cache import VocabularyCache
from loraplex.scheduler.request import Request, RequestRefused

MAX_COMPILING = 1024
BEGIN_THREADS = 2


class GrammarQueue:
    """Gives requests their constraints. Its own threads compile and compute masks.

    One thread calls the methods. `wakeup` is set when `take_compiled` or `take_failed` has
    something, or a mask is ready.
    """

    def __init__(self, vocabularies: VocabularyCache, wakeup: Callable[[], None]) -> None:
        self._compiler = GrammarCompiler(vocabularies)
        self._wakeup = wakeup
        self._masks = MaskComputer(wakeup)
        self._pool = ThreadPoolExecutor(BEGIN_THREADS, thread_name_prefix="begin")
        self._compiling: dict[Hashable, Request] = {}
        self._compiled: deque[tuple[Request, str]] = deque()
        self._failed: deque[tuple[Hashable, str]] = deque()

    def add(self, request: Request) -> None:
        """Compile the grammar of a request. Returns at once.

        Raises:
            RequestRefused: too many are being compiled, or the id is in use.
        """
        assert request.grammar is not None
        if request.uid in self._compiling:
            raise RequestRefused("bad_request", f"request id {request.request_id!r} is in use")
        if len(self._compiling) >= MAX_COMPILING:
            raise RequestRefused(
                "queue_full", f"{MAX_COMPILING} grammars are being compiled: try again later"
            )
        self._compiling[request.uid] = request
        client = (request.frontend, request.tenant, request.client)
        self._compiler.start(request.grammar, client, partial(self._on_compiled, request))

    def abort(self, request_id: int, frontend: Hashable) -> None:
        """Forget a request that is not compiled yet. Others do no harm."""
        self._compiling.pop((frontend, request_id), None)

    def abort_all(self, frontend: Hashable) -> None:
        """Forget the requests of a frontend that are not compiled yet."""
        for request in [r for r in self._compiling.values() if r.frontend == frontend]:
            del self._compiling[request.uid]

    def take_compiled(self) -> list[tuple[Request, str]]:
        """Returns requests for the scheduler, each with its error or ""."""
        taken = []
        while self._compiled:
            request, error = self._compiled.popleft()
            if self._compiling.get(request.uid) is request:
                del self._compiling[request.uid]
                taken.append((request, error))
        return taken

    def take_failed(self) -> list[tuple[Hashable, str]]:
        """Returns the uids of running requests for which no mask can be computed, and why."""
        return [self._failed.popleft() for _ in range(len(self._failed))]

    def wait_for_masks(self, timeout_s: float) -> None:
        """Wait until no running request lacks its mask, or the time is over."""
        self._masks.wait(timeout_s)

    def close(self) -> None:
        self._compiler.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._masks.close()

    def _on_compiled(self, request: Request, future: "Future[LLMatcher]") -> None:
        error = future.exception()
        if error is not None:
            self._finish(request, error_text(error))
        else:
            self._pool.submit(self._begin, request, future.result())

    def _begin(self, request: Request, compiled: LLMatcher) -> None:
        """Make the request's own matcher, and have its first mask computed."""
        assert request.grammar is not None
        errors: list[str] = []
        matcher = GrammarMatcher(
            compiled.deep_copy(),
            self._compiler.vocabularies.of(request.grammar),
            stop_ids=request.stop_ids,
            min_tokens=request.grammar.min_tokens,
            on_advance=self._advance,
            on_error=errors.append,
        )
        done = partial(self._begun, request, matcher, errors)
        if matcher.consume(request.generated_token_ids):
            self._masks.add_first(MaskTask(matcher, (), done=done))
        else:
            done()

    def _begun(self, request: Request, matcher: GrammarMatcher, errors: list[str]) -> None:
        matcher.on_error = partial(self._fail, request.uid)
        request.constraint = matcher
        self._finish(request, f"structured_outputs: {errors[0]}" if errors else "")

    def _advance(
        self, matcher: GrammarMatcher, token_ids: "array[int]", drafts: "array[int]"
    ) -> None:
        self._masks.add_next(MaskTask(matcher, token_ids, drafts))

    def _finish(self, request: Request, error: str) -> None:
        self._compiled.append((request, error))
        self._wakeup()

    def _fail(self, uid: Hashable, text: str) -> None:
        self._failed.append((uid, f"structured_outputs: {text}"))
