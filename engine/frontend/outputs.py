"""Turns token ids into the client's "output" messages: text, stop strings, logprobs, usage."""

import functools
from array import array
from collections import deque
from collections.abc import Callable
from typing import Any

from loraplex.engine.frontend.detokenizer import IncrementalDetokenizer
from loraplex.engine.frontend.inputs import TextCodec
from loraplex.engine.frontend.protocol import GenerateRequest
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.scheduler.frontend_protocol import SequenceOutput
from loraplex.scheduler.worker_protocol import TokenLogprobs

MAX_CONVERTED_AT_ONCE = 256  # prompt logprobs of a step; the rest waits for its turn
DecodeToken = Callable[[int], str]


class CompletionProcessor:
    """Collects what one of the n completions has that the client has not been sent."""

    def __init__(
        self,
        index: int,
        params: SamplingParams,
        *,
        detokenizer: IncrementalDetokenizer | None,
        decode_token: DecodeToken,
        final_only: bool,
    ) -> None:
        """`detokenizer` is None if the client wants no text."""
        self.index = index
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._params = params
        self._detokenizer = detokenizer
        self._decode_token = decode_token
        # Text is needed before the end only for partial outputs and for stop strings.
        self._detokenize_late = final_only and not params.stop_strings
        self._late_ids: list[int] = []
        self._end_taken = False
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[list[Any]] = []

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def update(self, output: SequenceOutput) -> bool:
        """Adds a step's tokens, up to the one that completes a stop string.

        Returns True if a stop string ended the completion. The scheduler does not know text, so
        the caller must abort the sequence there.
        """
        token_ids = output.token_ids.tolist()
        stop_string = self._add_text(token_ids, output)
        if stop_string is not None and self._detokenizer is not None:
            token_ids = token_ids[: self._detokenizer.num_tokens - self.num_tokens]
        self.num_tokens += len(token_ids)
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        self._token_ids += token_ids
        if self._params.logprobs is not None:
            self._logprobs += [
                logprob_entries(entry, self._decode_token)
                for entry in output.logprobs[: len(token_ids)]
            ]
        if stop_string is not None:
            self.finish_reason, self.stop_reason = "stop", stop_string
            return output.finish_reason == ""
        if output.finish_reason:
            self.finish_reason = output.finish_reason
            if output.stop_token_id in (self._params.stop_token_ids or ()):
                self.stop_reason = output.stop_token_id
        return False

    def abort(self) -> None:
        """Ends the completion and releases the text that was held back for a stop string."""
        if not self.finished:
            self.finish_reason = "abort"
            self._flush()

    def take(self) -> dict[str, Any] | None:
        """Returns what is new since the last call as an entry of "outputs", None if nothing is."""
        if self._end_taken or not (self._token_ids or self.finished):
            return None
        self._end_taken = self.finished
        entry: dict[str, Any] = {
            "index": self.index,
            "text": "".join(self._text),
            "token_ids": self._token_ids,
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
        }
        if self._params.logprobs is not None:
            entry["logprobs"] = self._logprobs
        self._text, self._token_ids, self._logprobs = [], [], []
        return entry

    def _add_text(self, token_ids: list[int], output: SequenceOutput) -> str | None:
        """Returns the stop string that was found, if any."""
        if self._detokenizer is None:
            return None
        hides_stop = output.stop_token_id >= 0 and not self._params.include_stop_str_in_output
        if hides_stop and token_ids and token_ids[-1] == output.stop_token_id:
            token_ids = token_ids[:-1]
        if self._detokenize_late:
            self._late_ids += token_ids
        else:
            self._push(token_ids)
        if self._detokenizer.stopped is None and output.finish_reason:
            self._flush()
        return self._detokenizer.stopped

    def _push(self, token_ids: list[int]) -> None:
        if self._detokenizer is not None and token_ids:
            self._text.append(self._detokenizer.push(token_ids))

    def _flush(self) -> None:
        if self._detokenizer is not None and self._detokenizer.stopped is None:
            self._push(self._late_ids)
            self._late_ids = []
            self._text.append(self._detokenizer.flush())


def logprob_entries(entry: TokenLogprobs, decode_token: DecodeToken) -> list[Any]:
    """Returns ``[[token id, logprob, rank, text], ...]``, the sampled token first."""
    return [
        [token_id, logprob, rank, decode_token(token_id)]
        for token_id, logprob, rank in zip(
            entry.token_ids, entry.logprobs, entry.ranks, strict=True
        )
    ]


class OutputProcessor:
    """Makes the reply messages of one request from the outputs of its n sequences.

    Each message holds only what is new, so a request costs O(new tokens) a step.
    """

    def __init__(
        self,
        request_id: str,
        completions: list[CompletionProcessor],
        *,
        prompt_token_ids: "array[int]",
        echo_prompt: bool,
        final_only: bool,
        decode_token: DecodeToken,
        scores_prompt: bool = False,
    ) -> None:
        """`scores_prompt`: the client wants prompt logprobs. The first sequence brings them."""
        self.completions = completions
        self._request_id = request_id
        self._prompt_token_ids = prompt_token_ids
        self._echo_prompt = echo_prompt
        self._final_only = final_only
        self._decode_token = decode_token
        # The first token of a prompt has no logprob: nothing precedes it.
        self._prompt_logprobs: list[list[Any] | None] = [None] if scores_prompt else []
        self._raw_prompt_logprobs: deque[TokenLogprobs] = deque()

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._prompt_token_ids)

    @property
    def sizes(self) -> dict[str, int]:
        """Numbers of tokens of the prompt and of all completions, and of completions."""
        num_output = sum(completion.num_tokens for completion in self.completions)
        n = len(self.completions)
        return {"num_prompt": self.num_prompt_tokens, "num_output": num_output, "n": n}

    @property
    def finish_reasons(self) -> str:
        """The different reasons of the completions that have ended, joined by commas."""
        reasons = (completion.finish_reason for completion in self.completions)
        return ",".join(dict.fromkeys(reason for reason in reasons if reason))

    @property
    def needs_conversion(self) -> bool:
        """Tells whether convert() has prompt logprobs to prepare for the reply."""
        return bool(self._raw_prompt_logprobs)

    def convert(self, max_entries: int) -> int:
        """Prepares prompt logprobs for the reply. Returns the number of entries made.

        Stops after the token that reaches `max_entries`, so that no request holds up the others.
        """
        num_entries = 0
        while self._raw_prompt_logprobs and num_entries < max_entries:
            entry = self._raw_prompt_logprobs.popleft()
            self._prompt_logprobs.append(logprob_entries(entry, self._decode_token))
            num_entries += len(entry.token_ids)
        return num_entries

    def drop_unconverted(self) -> None:
        """Leaves out the prompt logprobs that are not prepared: the request was cancelled."""
        self._raw_prompt_logprobs.clear()

    @property
    def finished(self) -> bool:
        return all(completion.finished for completion in self.completions)

    def update(self, index: int, output: SequenceOutput) -> bool:
        """Adds a step's tokens to completion `index`; see CompletionProcessor.update."""
        self._raw_prompt_logprobs += output.prompt_logprobs
        self.convert(MAX_CONVERTED_AT_ONCE)
        return self.completions[index].update(output)

    def take_reply(self) -> dict[str, Any] | None:
        """Returns the next "output" message, None if there is nothing to send yet."""
        if self.needs_conversion:
            return None
        finished = self.finished
        if not finished and (self._final_only or self._waits_for_prompt_logprobs()):
            return None
        entries = [entry for c in self.completions if (entry := c.take()) is not None]
        if not entries:
            return None
        reply: dict[str, Any] = {
            "type": "output",
            "request_id": self._request_id,
            "outputs": entries,
            "finished": finished,
        }
        if self._echo_prompt:
            reply["prompt_token_ids"] = self._prompt_token_ids.tolist()
            self._echo_prompt = False
        if self._prompt_logprobs:
            reply["prompt_logprobs"] = self._prompt_logprobs
            self._prompt_logprobs = []
        if finished:
            reply["usage"] = {
                "prompt_tokens": len(self._prompt_token_ids),
                "completion_tokens": sum(c.num_tokens for c in self.completions),
                "cached_tokens": self.completions[0].num_cached_tokens,
            }
        return reply

    def _waits_for_prompt_logprobs(self) -> bool:
        """Tells whether another completion was faster than the one that scores the prompt."""
        first = self.completions[0]
        return bool(self._prompt_logprobs) and not (first.num_tokens or first.finished)


class OutputFactory:
    """Makes the OutputProcessor of each request."""

    def __init__(self, codec: TextCodec | None) -> None:
        """`codec` is None if answers are token ids."""
        self._codec = codec
        self._decode_token = functools.lru_cache(maxsize=65536)(self._decode_one)

    def make(self, message: GenerateRequest, token_ids: "array[int]") -> OutputProcessor:
        """Returns the processor of a request whose prompt is `token_ids`."""
        params = message.sampling_params
        completions = [
            CompletionProcessor(
                index,
                params,
                detokenizer=self._new_detokenizer(message, token_ids),
                decode_token=self._decode_token,
                final_only=message.final_only,
            )
            for index in range(params.n)
        ]
        return OutputProcessor(
            message.request_id,
            completions,
            prompt_token_ids=token_ids,
            echo_prompt=message.return_prompt_token_ids,
            final_only=message.final_only,
            decode_token=self._decode_token,
            scores_prompt=params.prompt_logprobs is not None,
        )

    def _new_detokenizer(
        self, message: GenerateRequest, token_ids: "array[int]"
    ) -> IncrementalDetokenizer | None:
        params = message.sampling_params
        if self._codec is None or not params.detokenize:
            return None
        return IncrementalDetokenizer(
            self._codec.tokenizer,
            token_ids,
            skip_special_tokens=params.skip_special_tokens,
            stop=params.stop_strings,
            include_stop_str_in_output=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )

    def _decode_one(self, token_id: int) -> str:
        if self._codec is None:
            return ""
        return self._codec.tokenizer.decode([token_id], skip_special_tokens=False)
