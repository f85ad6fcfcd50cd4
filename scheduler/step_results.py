"""Hands the result of a step to its requests and writes their outputs."""

import math
from array import array

from loraplex.memory.accounting.kv_cache import KVCache
from loraplex.scheduler.frontend_protocol import SequenceOutput
from loraplex.scheduler.request import Request, RequestState
from loraplex.scheduler.stats import SchedulerStats
from loraplex.scheduler.step_builder import StepBuilder
from loraplex.scheduler.worker_protocol import NOT_FINITE, StepResult, TokenLogprobs

Ended = list[tuple[Request, str]]
"""Requests that end, each with its reason, one of FINISH_REASONS."""


def apply_result(
    step: StepBuilder, result: StepResult, kv: KVCache, stats: SchedulerStats
) -> Ended:
    """Append sampled ids to their requests and register computed blocks in the prefix cache.

    A token is a row of the output columns of its request's frontend. It becomes part of a
    SequenceOutput only if it is the request's first or last one, has log-probabilities, or comes
    with others. A row that verified drafts brings the accepted ones and one token more; what the
    others wrote does not count as computed. Requests that ended meanwhile get nothing. A request
    that was preempted meanwhile keeps its new ids, but its pages are no longer its own. A request
    whose logits are not finite ends with an error, and its blocks leave the prefix cache.

    Returns:
        The requests that end with this step; the caller has to end them.
    """
    ended: Ended = []
    prompt_logprobs = _sort_prompt_logprobs(step, result)
    logprobs = result.logprobs
    block_tokens, finished = kv.block_tokens, RequestState.FINISHED
    num_generated = end = 0  # tokens; end of the row's sampled ids
    for request, epoch, position, num_tokens, samples, num_new in zip(
        step.requests, step.page_epochs, step.positions, step.num_tokens, step.samples,
        step.num_new, strict=True,
    ):  # fmt: skip
        judged = prompt_logprobs.get(request) if prompt_logprobs else None
        num_computed = position + num_tokens
        first, end = end, end + samples
        if samples:
            if request.state is finished:
                stats.num_dropped_tokens += 1
                continue
            token_ids, token_id = request.token_ids, result.token_ids[first]
            num_generated += num_new
            if (  # what nearly all rows bring, without a call
                request.num_prompt_tokens < len(token_ids) < request.max_total - 1
                and token_id >= 0
                and token_id not in request.stop_ids
                and request.drafter is None
                and request.constraint is None
                and judged is None
                and (not logprobs or logprobs[first] is None)
            ):
                token_ids.append(token_id)
                request.outputs.request_ids.append(request.request_id)
                request.outputs.token_ids.append(token_id)
            else:
                if samples > 1:
                    num_computed = position + num_new
                    _accept(request, samples, num_new, stats)
                new = slice(first, first + num_new)
                reason = _append(request, result.token_ids[new], logprobs[new], judged, kv)
                if reason:
                    ended.append((request, reason))
                if reason == "error":
                    stats.num_dropped_tokens += 1
                    num_generated -= 1
                    continue
        elif judged and not _are_finite(judged):
            _fail(request, position + num_tokens, judged, kv)
            ended.append((request, "error"))
            continue
        elif judged is not None:
            request.outputs.details.append(
                SequenceOutput(request.request_id, array("i"), prompt_logprobs=judged)
            )
        if num_computed - request.num_registered >= block_tokens and request.page_epoch == epoch:
            kv.register(request.uid, request.token_ids, num_computed)
            request.num_registered = num_computed - num_computed % block_tokens
    _count(step, result, stats)
    stats.num_generated_tokens += num_generated
    return ended


def _accept(request: Request, samples: int, num_new: int, stats: SchedulerStats) -> None:
    """Count what a row that verified drafts brings beyond the one token it was planned for."""
    request.is_verifying = False
    request.num_scheduled += num_new - 1
    request.num_total += num_new - 1
    stats.num_drafted_tokens += samples - 1
    stats.num_accepted_tokens += num_new - 1


def _append(
    request: Request,
    new_ids: "array[int]",
    logprobs: list[TokenLogprobs | None],
    judged: list[TokenLogprobs] | None,
    kv: KVCache,
) -> str:
    """Append new tokens and write them to the outputs. Returns why the request ends, or nothing.

    Only the last one can end it or be NOT_FINITE: those before it were drafts.
    """
    token_ids, token_id = request.token_ids, new_ids[-1]
    if token_id == NOT_FINITE or (judged and not _are_finite(judged)):
        if accepted := new_ids[:-1]:
            token_ids.extend(accepted)
            _add_details(request, accepted, logprobs[:-1], judged=None)
        _fail(request, len(token_ids), judged, kv)
        return "error"
    token_ids.extend(new_ids)
    reason = ""
    if (
        request.num_prompt_tokens + 1 < len(token_ids) < request.max_total
        and token_id not in request.stop_ids
        and len(new_ids) == 1
        and (not logprobs or logprobs[0] is None)
        and judged is None
    ):
        outputs = request.outputs
        outputs.request_ids.append(request.request_id)
        outputs.token_ids.append(token_id)
    else:
        reason = request.finish_reason()
        _add_details(request, new_ids, logprobs, judged, reason)
    if not reason:
        if request.drafter is not None:
            request.drafts = request.drafter.draft(token_ids)
        if request.constraint is not None:
            request.constraint.advance(new_ids, request.drafts)
    return reason


def _add_details(
    request: Request,
    new_ids: "array[int]",
    logprobs: list[TokenLogprobs | None],
    judged: list[TokenLogprobs] | None,
    reason: str = "",
) -> None:
    """Write the output of the tokens just appended, after which the request ends for `reason`."""
    request.outputs.details.append(
        SequenceOutput(
            request.request_id,
            new_ids,
            finish_reason=reason,
            stop_token_id=new_ids[-1] if reason == "stop" else -1,
            num_cached_tokens=request.num_cached_tokens,
            logprobs=[entry for entry in logprobs if entry is not None],
            prompt_logprobs=judged or [],
            queued_us=max(0, int(1e6 * (request.admitted_at - request.arrival))),
        )
    )


def _are_finite(entries: list[TokenLogprobs]) -> bool:
    """False if the logits at any of these prompt positions were not finite."""
    return not any(math.isnan(entry.logprobs[0]) for entry in entries)


def _fail(request: Request, position: int, judged: list[TokenLogprobs] | None, kv: KVCache) -> None:
    """Write the error of a request whose logits for `position`, or for one of the prompt tokens
    judged before it, are not finite."""
    if request.chain is not None:
        kv.forget(request.chain)
    if judged and not _are_finite(judged):
        end = request.num_prompt_logprobs
        is_bad = [math.isnan(entry.logprobs[0]) for entry in judged]
        position = end - len(judged) + is_bad.index(True)
    who = f"adapter {request.adapter!r}" if request.adapter else "the base model"
    restricted = ""
    sampling = request.sampling
    if request.constraint is not None or sampling.allowed_token_ids or sampling.bad_word_ids:
        restricted = (
            "; or structured_outputs, allowed_token_ids, bad_words and logit_bias together allow "
            "no token"
        )
    text = (
        f"{who} gave logits that are NaN or infinite for the token at position {position}, so the "
        "request ends there: check the weights and scale of the adapter, and those of the base "
        "model; float16 overflows where bfloat16 does not" + restricted
    )
    request.outputs.details.append(
        SequenceOutput(
            request.request_id,
            array("i"),
            finish_reason="error",
            error=text,
            error_code="not_finite",
        )
    )


def _count(step: StepBuilder, result: StepResult, stats: SchedulerStats) -> None:
    stats.num_steps += 1
    stats.step_us += result.step_us
    by_kernels = stats.steps_by_kernels
    by_kernels[result.kernels] = by_kernels.get(result.kernels, 0) + 1
    if step.follows:
        stats.busy_us += result.step_us
        stats.idle_us += result.idle_us


def _sort_prompt_logprobs(
    step: StepBuilder, result: StepResult
) -> dict[Request, list[TokenLogprobs]]:
    """Returns prompt logprobs by request, in order of position.

    A recomputed prompt brings its logprobs again; those are dropped.
    """
    if not result.prompt_logprobs:
        return {}
    by_slot = dict(zip(step.slots, step.requests, strict=True))
    found: dict[Request, list[TokenLogprobs]] = {}
    for chunk in result.prompt_logprobs:
        if chunk.slot not in by_slot:
            raise ValueError(f"step {step.step_id} has no row for slot {chunk.slot}")
        request = by_slot[chunk.slot]
        if request.state is RequestState.FINISHED:
            continue
        num_known = request.num_prompt_logprobs - chunk.first_position
        if num_known < 0:
            raise ValueError(
                f"prompt logprobs of request {request.request_id!r} skip from position "
                f"{request.num_prompt_logprobs} to {chunk.first_position}"
            )
        fresh = chunk.entries[num_known:]
        if fresh:
            request.num_prompt_logprobs += len(fresh)
            found.setdefault(request, []).extend(fresh)
    return found
