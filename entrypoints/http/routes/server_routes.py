"""GET /health, /ready and /version, POST /tokenize and /detokenize."""

import asyncio
from importlib.metadata import version as version_of
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from loraplex.engine.errors import client_error
from loraplex.engine.frontend import protocol
from loraplex.engine.frontend.requests import POOL_PROMPT_CHARS
from loraplex.engine.tokenizer.tokenizer import Tokenizer
from loraplex.entrypoints.http.answer_response import JsonResponse
from loraplex.entrypoints.http.engine_link import EngineLink
from loraplex.entrypoints.http.errors import HttpError
from loraplex.entrypoints.http.requests.bodies import DetokenizeBody, TokenizeBody
from loraplex.entrypoints.http.requests.body_reader import BodyReader
from loraplex.entrypoints.http.requests.conversion import tokenize_message

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

        def encode() -> list[int]:
            if body.prompt is not None and not body.add_special_tokens:
                return tokenizer.encode(body.prompt, add_special_tokens=False)
            return frontend.inputs.encode(message)

        length = int(request.headers.get("content-length", POOL_PROMPT_CHARS + 1))
        token_ids = await self._in_pool(encode) if length > POOL_PROMPT_CHARS else encode()
        texts = [tokenizer.id_to_token(i) for i in token_ids] if body.return_token_strs else None
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
        tokenizer = self._tokenizer()
        return JsonResponse({"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)})

    def _tokenizer(self) -> Tokenizer:
        if self._link.codec is None:
            raise client_error(
                "bad_request", "this server runs without a tokenizer (skip_tokenizer_init)"
            )
        return self._link.codec.tokenizer

    async def _in_pool(self, encode: Any) -> list[int]:
        if self._num_pooled >= MAX_POOLED:
            raise HttpError(429, "too many long texts wait to be tokenized: try again later")
        self._num_pooled += 1
        try:
            token_ids: list[int] = await asyncio.to_thread(encode)
            return token_ids
        finally:
            self._num_pooled -= 1
