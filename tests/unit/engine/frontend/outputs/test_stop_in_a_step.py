"""Several tokens of one step: the answer ends at the token that completes a stop string."""

from array import array

from loraplex.engine.frontend.detokenizer import IncrementalDetokenizer
from loraplex.engine.frontend.inputs import TextCodec
from loraplex.engine.frontend.outputs import CompletionProcessor
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.scheduler.frontend_protocol import SequenceOutput
from loraplex.scheduler.worker_protocol import TokenLogprobs


def logprobs_of(token_ids: list[int]) -> list[TokenLogprobs]:
    return [TokenLogprobs(array("i", [i]), array("f", [-1.0]), array("i", [1])) for i in token_ids]


def test_tokens_after_a_stop_string_are_dropped(codec: TextCodec) -> None:
    tokenizer = codec.tokenizer
    token_ids = tokenizer.encode("0 1 2 3 4 5 6 7", add_special_tokens=False)
    texts = [tokenizer.decode(token_ids[: count + 1]) for count in range(len(token_ids))]
    num_kept = next(count for count, text in enumerate(texts, 1) if "4" in text)
    for first in (0, 2, num_kept - 1):
        params = SamplingParams(stop="4", logprobs=0)
        processor = CompletionProcessor(
            0,
            params,
            detokenizer=IncrementalDetokenizer(tokenizer, [], stop=["4"]),
            decode_token=str,
            final_only=False,
        )
        for part in (token_ids[:first], token_ids[first:]):
            aborts = processor.update(
                SequenceOutput(1, array("i", part), logprobs=logprobs_of(part))
            )
        assert aborts
        entry = processor.take()
        assert entry is not None
        assert entry["token_ids"] == token_ids[:num_kept] and processor.num_tokens == num_kept
        assert len(entry["logprobs"]) == num_kept
        assert (entry["finish_reason"], entry["stop_reason"]) == ("stop", "4")
        assert entry["text"] == texts[num_kept - 1].partition("4")[0]
