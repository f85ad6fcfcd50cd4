"""Checks of a new request. A request that passes can be served to its end."""

from typing import NamedTuple

from loraplex.memory.accounting.page_manager import PageManager
from loraplex.scheduler.adapters.binding import not_ready
from loraplex.scheduler.frontend_protocol import AdapterVocabulary
from loraplex.scheduler.request import Request, RequestRefused
from loraplex.scheduler.waiting_queue import WaitingQueue

PLAIN_LORA = "lora"
"""The kind of an adapter that adds a product and nothing else; see AdapterInspected."""


class Pinned(NamedTuple):
    """Pages and slots that pinned adapters take."""

    num_pages: int
    num_slots: int


def check_queue(request: Request, waiting: WaitingQueue, max_queue_len: int) -> None:
    """Refuse a request for which the queue has no place.

    A requester may have no more waiting requests than there are free places: alone it gets half of
    the queue, and of k requesters that all ask for more each gets a part of k + 1. A request
    without a requester may take the last place.

    Raises:
        RequestRefused: the queue, or the requester's share of it, is full.
    """
    num_free = max_queue_len - len(waiting)
    if num_free < 1:
        raise RequestRefused(
            "queue_full", f"{max_queue_len} requests wait already; try again later"
        )
    num_own = waiting.num_of(request.requester) if request.requester is not None else 0
    if num_own >= num_free:
        whose = f"of tenant {request.tenant!r}" if request.tenant else "of this client"
        raise RequestRefused(
            "queue_full",
            f"{num_own} requests {whose} wait already and {num_free} places of the queue are free: "
            "one may have no more waiting than are free; try again later",
        )


def check_lengths(request: Request, max_model_len: int) -> None:
    """Set the length to which the request may grow.

    Raises:
        RequestRefused: there is no token to compute, or none to generate.
    """
    num_prompt, max_tokens = request.num_prompt_tokens, request.sampling.max_tokens
    if not num_prompt:
        raise RequestRefused("bad_request", "the prompt has no tokens")
    if num_prompt >= max_model_len:
        raise RequestRefused(
            "bad_request",
            f"the prompt has {num_prompt} tokens; with at least one more to generate, "
            f"max_model_len ({max_model_len}) allows {max_model_len - 1}",
        )
    if max_tokens < 1:
        raise RequestRefused("bad_request", f"max_tokens must be at least 1, got {max_tokens}")
    request.max_total = min(num_prompt + max_tokens, max_model_len)
    if len(request.token_ids) >= request.max_total:
        raise RequestRefused(
            "bad_request",
            f"{len(request.generated_token_ids)} tokens were generated already; max_tokens "
            f"({max_tokens}) and max_model_len ({max_model_len}) allow no more",
        )


def service_problem(request: Request, memory: PageManager, pinned_besides: Pinned) -> str:
    """Return the reason if the request could not be served even by an empty pool, else "".

    An adapter of another kind than plain LoRA changes more than a sum, so no mix may have it. The
    KV of the last token is never computed. An adapter that was not inspected counts as 0 pages.

    Args:
        pinned_besides: what pinned adapters other than the request's own take.
    """
    if problem := _mix_problem(request):
        return problem
    num_pinned, versions = pinned_besides.num_pages, request.versions
    num_slots = memory.adapters.max_slots - pinned_besides.num_slots
    if len(versions) > num_slots:
        return (
            f"it mixes {len(versions)} adapters, but {num_slots} adapter slots are not taken by "
            "pinned ones; raise max_adapter_slots or unpin some"
        )
    num_kv = memory.kv.num_pages_for(request.max_total - 1)
    num_weights = sum(version.num_pages for version in versions.values())
    num_usable = memory.blocks.num_usable - num_pinned
    if num_kv + num_weights <= num_usable:
        return ""
    whose = "its adapters" if len(versions) > 1 else "its adapter"
    weights = f" and {whose} {num_weights}" if num_weights else ""
    pinned = f" beside {num_pinned} of pinned adapters" if num_pinned else ""
    return (
        f"prompt and max_tokens need {num_kv} pages of KV cache{weights}, but the pool has "
        f"{num_usable}{pinned}; lower max_tokens, shorten the prompt or enlarge the pool"
    )


def check_service(request: Request, memory: PageManager, pinned_besides: Pinned) -> None:
    """Refuse what an empty pool could not serve, and a prompt encoded by another vocabulary.

    The check is repeated when the request's adapters were inspected.

    Raises:
        RequestRefused: the request has no way to its end, or must be encoded again: the refusal
            says by which vocabulary.
    """
    if problem := service_problem(request, memory, pinned_besides):
        raise RequestRefused("bad_request", problem)
    if not_ready(request.bindings) is not None:
        return
    wanted = AdapterVocabulary()
    if len(request.bindings) == 1:
        wanted = request.bindings[0].version.vocabulary
    if request.vocabulary != wanted.key:
        text = "the adapter was replaced while the prompt was encoded: send the request again"
        raise RequestRefused("adapter", text, vocabulary=wanted)


def _mix_problem(request: Request) -> str:
    if len(request.bindings) == 1 and request.bindings[0].weight == 1:
        return ""
    for version in request.versions.values():
        if version.kind not in ("", PLAIN_LORA):
            return (
                f"adapter {version.name!r} is of the kind {version.kind}: only plain LoRA may have "
                "a weight or be mixed with other adapters; name it alone"
            )
    return ""
