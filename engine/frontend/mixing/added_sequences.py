"""Makes the scheduler's requests of a client's one: a sequence for each answer."""

from array import array
from collections.abc import Iterator, Sequence

from loraplex.engine.frontend.protocol import GenerateRequest
from loraplex.scheduler.frontend_protocol import AddRequest, GrammarSpec, MixPart
from loraplex.scheduler.worker_protocol import SamplingSpec


def added_sequences(
    message: GenerateRequest,
    parts: list[MixPart],
    *,
    prompt_token_ids: "array[int]",
    ids: Sequence[int],
    specs: Sequence[SamplingSpec],
    grammar: GrammarSpec | None,
    client: bytes,
    vocabulary: str,
) -> Iterator[AddRequest]:
    """Yields one AddRequest for each of `ids` and `specs`; `parts` are its adapters."""
    only = parts[0] if len(parts) == 1 and parts[0].weight == 1 else None
    for index, (sequence_id, spec) in enumerate(zip(ids, specs, strict=True)):
        yield AddRequest(
            request_id=sequence_id,
            prompt_token_ids=prompt_token_ids,
            sampling=spec,
            adapter=only.adapter if only else message.adapter_label,
            adapter_source=only.source if only else None,
            load_inplace=only.load_inplace if only else False,
            mix=[] if only else parts,
            salt=message.salt,
            priority=message.priority,
            use_prefix_cache=message.use_prefix_cache,
            grammar=grammar,
            tenant=message.tenant,
            client=client,
            index=index,
            num_answers=len(ids),
            vocabulary=vocabulary,
        )
