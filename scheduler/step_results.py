"""From a step's result to what it means for each request."""

from loraplex.memory.accounting.kv_cache import KVCache
from loraplex.scheduler.request import Request, RequestState, RequestUpdate
from loraplex.scheduler.stats import SchedulerStats
from loraplex.scheduler.step_builder import StepBuilder
from loraplex.scheduler.worker_protocol import StepResult, TokenLogprobs


def take_result(
    step: StepBuilder, result: StepResult, kv: KVCache, stats: SchedulerStats
) -> tuple[list[RequestUpdate], list[Request]]:
    """Append sampled ids to their requests and offer computed blocks to the prefix cache.

    Requests that ended meanwhile get nothing. One that was preempted meanwhile keeps its new id,
    but its pages are others' by now.

    Returns:
        The updates, and the requests that end with them; those are still to be ended.
    """
    updates: list[RequestUpdate] = []
    ended: list[Request] = []
    prompt_logprobs = _sort_prompt_logprobs(step, result)
    block_tokens, finished = kv.block_tokens, RequestState.FINISHED
    num_sampled = num_dropped = 0
    for request, run, position, num_tokens, samples in zip(
        step.requests, step.runs, step.positions, step.num_tokens, step.samples, strict=True
    ):
        if samples and request.state is finished:
            num_dropped += 1
        elif samples:
            update = _append(request, result, num_sampled)
            updates.append(update)
            if update.finish_reason:
                ended.append(request)
        num_sampled += samples
        if request.run == run and position + num_tokens - request.num_registered >= block_tokens:
            num_computed = position + num_tokens
            kv.register(request.request_id, request.token_ids, num_computed)
            request.num_registered = num_computed - num_computed % block_tokens
        if prompt_logprobs and request in prompt_logprobs:
            if not samples:
                updates.append(
                    RequestUpdate(request.request_id, num_cached_tokens=request.num_cached_tokens)
                )
            updates[-1].prompt_logprobs = prompt_logprobs[request]
    stats.num_steps += 1
    stats.step_us += result.step_us
    by_kernels = stats.steps_by_kernels
    by_kernels[result.kernels] = by_kernels.get(result.kernels, 0) + 1
    if step.follows:
        stats.busy_us += result.step_us
        stats.idle_us += result.idle_us
    stats.num_generated_tokens += num_sampled - num_dropped
    stats.num_dropped_tokens += num_dropped
    return updates, ended


def _append(request: Request, result: StepResult, index: int) -> RequestUpdate:
    token_ids = result.token_ids[index : index + 1]
    token_id = token_ids[0]
    request.token_ids.append(token_id)
    reason, stop_token_id = "", -1
    if token_id in request.stop_ids or len(request.token_ids) >= request.max_total:
        reason = request.finish_reason()
        stop_token_id = token_id if reason == "stop" else -1
    entry = result.logprobs[index] if result.logprobs else None
    # By position, every field given: this runs for each token of every step.
    return RequestUpdate(
        request.request_id, token_ids, reason, stop_token_id, "", "", request.num_cached_tokens,
        [entry] if entry else [], [],
    )  # fmt: skip


def _sort_prompt_logprobs(
    step: StepBuilder, result: StepResult
) -> dict[Request, list[TokenLogprobs]]:
    """By request, in order of position; what a recomputation brings again is dropped."""
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
