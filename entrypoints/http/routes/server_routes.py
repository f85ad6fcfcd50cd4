"""GET /health, /ready and /version, POST /tokenize and /detokenize."""

import asyncio
from collections.abc import Callable
from importlib.metadata import version as version_of
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from loraplex.engine.errors import client_error
from loraplex.engine.frontend import protocol
from loraplex.engine.frontend.field_checks import short
from loraplex.engine.frontend.requests import POOL_PROMPT_CHARS
from loraplex.engine.tokenizer.tokenizer import Tokenizer
from loraplex.entrypoints.http.answer_response import JsonResponse
from loraplex.entrypoints.http.engine_link import EngineLink
from loraplex.entrypoints.http.errors import HttpError
from loraplex.entrypoints.http.requests.bodies import DetokenizeBody, TokenizeBody
from loraplex.entrypoints.http.requests.body_reader import BodyReader
from loraplex.entrypoints.http.requests.conversion import tokenize_message

Result = TypeVar("Result")
MAX_POOLED = 4  # long texts that /tokenize encodes or lets wait at one time


class ServerRoutes:
    """Answers from the frontend's own knowledge, without the scheduler."""

    def __init__(self, link: EngineLink, bodies: BodyReader) -> None:
        self._link = link
        self._bodies = bodies
        self._num_pooled = 0

    async def health(self, request: Request) -> Response:
        """Answers 200 while the engine serves, with what the ZeroMQ message "health" says."""
        reply = await self._link.ask("health")
        return JsonResponse({k: v for k, v in reply.items() if k not in ("type", "request_id")})

    async def ready(self, request: Request) -> Response:
        """Answers 200 while requests are accepted."""
        self._link.check_serving()
        return Response()

    async def version(self, request: Request) -> Response:
        return JsonResponse({"version": version_of("loraplex")})

    async def tokenize(self, request: Request) -> Response:
        body = await self._bodies.read(request, TokenizeBody)
        frontend, info = self._link.frontend, self._link.info
        assert info is not None
        message = protocol.parse(tokenize_message(body))
        assert isinstance(message, protocol.GenerateRequest)
        tokenizer = self._tokenizer()

        def encode() -> tuple[list[int], list[str | None] | None]:
            if body.prompt is not None and not body.add_special_tokens:
                ids = frontend.inputs.encode_text(body.prompt, add_special_tokens=False)
            else:
                ids = frontend.inputs.encode(message)
            return ids, [tokenizer.id_to_token(i) for i in ids] if body.return_token_strs else None

        length = int(request.headers.get("content-length", POOL_PROMPT_CHARS + 1))
        pooled = length > POOL_PROMPT_CHARS
        token_ids, texts = await self._in_pool(encode) if pooled else encode()
        return JsonResponse(
            {
                "count": len(token_ids),
                "max_model_len": info.max_model_len,
                "tokens": token_ids,
                "token_strs": texts,
            }
        )

    async def detokenize(self, request: Request) -> Response:
        body = await self._bodies.read(request, DetokenizeBody)
        tokenizer, info = self._tokenizer(), self._link.info
        assert info is not None
        size = max(tokenizer.vocab_size, info.vocab_size)
        wrong = next((i for i in body.tokens if not 0 <= i < size), None)
        if wrong is not None:
            text = f"tokens: {short(wrong)} is outside the vocabulary of {size}"
            raise client_error("bad_request", text)
        return JsonResponse({"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)})

    def _tokenizer(self) -> Tokenizer:
        if self._link.codec is None:
            raise client_error(
                "bad_request", "this server runs without a tokenizer (skip_tokenizer_init)"
            )
        return self._link.codec.tokenizer

    async def _in_pool(self, encode: Callable[[], Result]) -> Result:
        if self._num_pooled >= MAX_POOLED:
            raise HttpError(429, "too many long texts wait to be tokenized: try again later")
        self._num_pooled += 1
        try:
            return await asyncio.to_thread(encode)
        finally:
            self._num_pooled -= 1
