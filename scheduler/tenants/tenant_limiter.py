"""The limits of the tenants. All frontends meet here, so a limit holds for their sum."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from loraplex.memory.accounting.block_manager import IntegrityError
from loraplex.scheduler.request import Request, RequestRefused
from loraplex.scheduler.tenants.tenant import Tenant
from loraplex.scheduler.tenants.token_bucket import TokenBucket

RETRY_S = 1.0  # when to try again for a place that another request must leave


class TenantLimiter:
    """Counts the unfinished sequences of each tenant, and its requests and tokens of a minute.

    A client's request is one for `requests_per_minute`, however many answers it asks for. It
    reserves the tokens of its prompt and the most that its answers may have, and at the end gives
    back what it did not use. One that reserves more than `tokens_per_minute` takes a full minute's
    tokens instead; what it uses beyond them keeps the tenant waiting afterwards.

    The operator, whose tenant is the empty text, has no limits.
    """

    def __init__(self, set_weights: Callable[[Mapping[str, float]], None]) -> None:
        """Makes a limiter that limits nobody. `set_weights` takes the weights of the tenants."""
        self._set_weights = set_weights
        self._limited: dict[str, Tenant] = {}
        self._requests: dict[str, TokenBucket] = {}
        self._tokens: dict[str, TokenBucket] = {}
        self._num_unfinished: Counter[str] = Counter()

    def set_tenants(self, tenants: Iterable[Tenant], now: float) -> None:
        """Replaces all limits and weights. Requests that were accepted go on."""
        tenants = list(tenants)
        self._limited = {tenant.name: tenant for tenant in tenants if tenant.is_limited}
        limits = self._limited.values()
        self._requests = _buckets(
            self._requests, {t.name: t.requests_per_minute for t in limits}, now
        )
        self._tokens = _buckets(self._tokens, {t.name: t.tokens_per_minute for t in limits}, now)
        self._set_weights({t.name: t.weight for t in tenants if t.weight is not None})

    def accept(self, request: Request, now: float) -> None:
        """Counts a sequence that nothing else refuses. on_end() must follow.

        The first sequence of a client's request takes the rates for all of them.

        Raises:
            RequestRefused: it would exceed a limit of its tenant. Nothing is counted then.
        """
        name = request.tenant
        tenant = self._limited.get(name)
        if tenant is not None:
            self._check_number(tenant, request)
            num_tokens = self._num_tokens(request)
            if request.index == 0:
                self._check_rate("requests", name, self._requests, 1, now)
                self._check_rate("tokens", name, self._tokens, num_tokens, now)
                _take(self._requests, name, 1, now)
                _take(self._tokens, name, num_tokens, now)
            request.reserved_tokens = num_tokens / request.num_answers
        self._num_unfinished[name] += 1

    def on_end(self, request: Request, now: float) -> None:
        """Counts a sequence less, and gives back the tokens that it did not use."""
        name = request.tenant
        self._num_unfinished[name] -= 1
        if not self._num_unfinished[name]:
            del self._num_unfinished[name]
        bucket = self._tokens.get(name)
        if bucket is not None and request.reserved_tokens:
            bucket.give_back(request.reserved_tokens - _num_used(request), now)

    def _check_number(self, tenant: Tenant, request: Request) -> None:
        limit, num_own = tenant.max_running_requests, self._num_unfinished[tenant.name]
        num_more = 1 if request.index else request.num_answers
        if limit is not None and num_own + num_more > limit:
            raise RequestRefused(
                "too_many_requests",
                f"tenant {tenant.name!r} has {num_own} unfinished requests and asks for "
                f"{num_more} more; its max_running_requests is {limit}, each of the n answers "
                "counted: send this one after others have finished",
                retry_after_s=RETRY_S,
            )

    def _check_rate(
        self, what: str, tenant: str, buckets: dict[str, TokenBucket], amount: float, now: float
    ) -> None:
        bucket = buckets.get(tenant)
        wait_s = bucket.wait_s(amount, now) if bucket is not None else 0.0
        if bucket is not None and wait_s > 0:
            asked = f"this request may take {amount:.0f} {what}; " if what == "tokens" else ""
            mend = ", or lower max_tokens" if what == "tokens" else ""
            raise RequestRefused(
                "rate_limited",
                f"tenant {tenant!r} has used up its {bucket.per_minute} {what} a minute: {asked}"
                f"try again in {wait_s:.1f} s{mend}",
                retry_after_s=wait_s,
            )

    def _num_tokens(self, request: Request) -> float:
        """Returns the most tokens of all answers to a client's request, cut to a minute's."""
        num_prompt = request.num_prompt_tokens
        num_tokens = num_prompt + request.num_answers * (request.max_total - num_prompt)
        bucket = self._tokens.get(request.tenant)
        return num_tokens if bucket is None else min(num_tokens, bucket.per_minute)

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Raises IntegrityError unless the counts are those of the unfinished `requests`."""
        if Counter(request.tenant for request in requests) != self._num_unfinished:
            raise IntegrityError("the unfinished requests of a tenant are counted wrongly")


def _buckets(
    old: Mapping[str, TokenBucket], limits: Mapping[str, int | None], now: float
) -> dict[str, TokenBucket]:
    """Returns a bucket for each limit: the old one of a tenant, or else a full one."""
    buckets: dict[str, TokenBucket] = {}
    for name, limit in limits.items():
        if limit is not None:
            buckets[name] = old.get(name) or TokenBucket(limit, now)
            buckets[name].set_limit(limit, now)
    return buckets


def _take(buckets: Mapping[str, TokenBucket], name: str, amount: float, now: float) -> None:
    if (bucket := buckets.get(name)) is not None:
        bucket.take(amount, now)


def _num_used(request: Request) -> int:
    """Returns the tokens that a sequence has cost. The first of its request pays the prompt."""
    if request.admitted_at < 0:
        return 0
    return len(request.token_ids) - (request.num_prompt_tokens if request.index else 0)
