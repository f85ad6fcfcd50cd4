"""Builds the answers of POST /v1/completions."""

from dataclasses import dataclass, field
from typing import Any

from loraplex.engine.frontend.inputs import TextCodec
from loraplex.entrypoints.http.answers.base_answer import BaseAnswer
from loraplex.entrypoints.http.answers.logprobs import CompletionLogprobs, Position, prompt_logprobs
from loraplex.entrypoints.http.requests.bodies import CompletionBody


@dataclass(slots=True)
class _Prompt:
    """One prompt, and what the first reply to it said. Each of its n choices repeats it."""

    text: str | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Position | None] | None = None


class CompletionAnswer(BaseAnswer):
    prefix = "cmpl"
    whole = chunk = "text_completion"

    def __init__(
        self,
        body: CompletionBody,
        *,
        model: str,
        request_id: str,
        codec: TextCodec | None,
        messages: list[dict[str, Any]],
    ) -> None:
        """`messages` are those that completion_messages() made of the body."""
        options = body.stream_options
        super().__init__(
            model=model,
            request_id=request_id,
            streams=bool(body.stream),
            include_usage=options is not None and options.include_usage,
            shows_tokens=bool(body.logprobs is not None or body.return_token_ids),
        )
        self._body = body
        self._codec = codec
        self._num_choices = body.n or 1
        self._prompts = [_Prompt(message.get("prompt")) for message in messages]
        self._logprobs: dict[int, CompletionLogprobs] = {}
        self._begun: set[int] = set()  # indices of choices that have had a part
        self._drops_token = bool(body.echo) and body.max_tokens == 0

    def choices(self, index: int, reply: dict[str, Any]) -> list[dict[str, Any]]:
        prompt = self._prompts[index]
        if "prompt_token_ids" in reply:
            prompt.token_ids = reply["prompt_token_ids"]
        if "prompt_logprobs" in reply:
            prompt.logprobs = reply["prompt_logprobs"]
        return [
            self._choice(index * self._num_choices + entry["index"], prompt, entry)
            for entry in reply["outputs"]
            if self.has_part(entry)
        ]

    @property
    def usage(self) -> dict[str, Any]:
        usage = super().usage
        if self._drops_token:
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return usage

    def _choice(self, number: int, prompt: _Prompt, entry: dict[str, Any]) -> dict[str, Any]:
        body = self._body
        is_first = number not in self._begun
        self._begun.add(number)
        text, positions, token_ids = entry["text"], entry.get("logprobs", []), entry["token_ids"]
        if self._drops_token:
            text, positions, token_ids = "", [], []
        echoes = is_first and bool(body.echo)
        choice: dict[str, Any] = {
            "index": number,
            "text": self._text_of(prompt) + text if echoes else text,
            "logprobs": None,
            "finish_reason": entry["finish_reason"],
            "stop_reason": entry["stop_reason"],
        }
        if body.logprobs is not None:
            choice["logprobs"] = self._logprobs_of(number, prompt if echoes else None, positions)
        if not self.streams:
            choice["prompt_logprobs"] = (
                None if body.prompt_logprobs is None else prompt_logprobs(prompt.logprobs or [])
            )
        if body.return_token_ids:
            choice["token_ids"] = token_ids
            if is_first:
                choice["prompt_token_ids"] = prompt.token_ids
        return choice

    def _logprobs_of(
        self, number: int, prompt: _Prompt | None, positions: list[Position]
    ) -> dict[str, Any]:
        """Returns the logprobs of the new tokens, after those of the prompt if it is given."""
        logprobs = self._logprobs.setdefault(number, CompletionLogprobs(self._body.logprobs or 0))
        if prompt is None:
            return logprobs.part([*positions])
        first_text = self._decode(prompt.token_ids[:1])
        return logprobs.part([*(prompt.logprobs or []), *positions], first_text)

    def _text_of(self, prompt: _Prompt) -> str:
        return self._decode(prompt.token_ids) if prompt.text is None else prompt.text

    def _decode(self, token_ids: list[int]) -> str:
        if self._codec is None:
            return ""
        return self._codec.tokenizer.decode(token_ids, skip_special_tokens=False)
