"""POST /v1/completions and /v1/chat/completions."""

from starlette.requests import Request
from starlette.responses import Response

from loraplex.engine.checkpoint.generation_defaults import generation_defaults
from loraplex.entrypoints.http.answer_response import AnswerResponse
from loraplex.entrypoints.http.answers.chat_answer import ChatAnswer
from loraplex.entrypoints.http.answers.completion_answer import CompletionAnswer
from loraplex.entrypoints.http.engine_link import EngineLink
from loraplex.entrypoints.http.requests.bodies import ChatBody, CompletionBody
from loraplex.entrypoints.http.requests.body_reader import BodyReader
from loraplex.entrypoints.http.requests.conversion import chat_message, completion_messages
from loraplex.entrypoints.http.requests.request_ids import request_id_of
from loraplex.entrypoints.http.served_models import ServedModels
from loraplex.entrypoints.http.tools.requested_tools import ToolFormats


class GenerationRoutes:
    """Starts engine requests and answers with what they generate."""

    def __init__(self, link: EngineLink, models: ServedModels, bodies: BodyReader) -> None:
        self._link = link
        self._models = models
        self._bodies = bodies
        self._defaults = generation_defaults(link.config.model.model)
        self._tools = ToolFormats(link.codec)

    async def completions(self, request: Request) -> Response:
        body = await self._bodies.read(request, CompletionBody)
        adapter = self._models.adapter_for(body.model, body.lora_path)
        messages = completion_messages(body, adapter, self._defaults)
        answer = CompletionAnswer(
            body,
            model=body.model or self._models.base,
            request_id=request_id_of(request, body.request_id),
            codec=self._link.codec,
            messages=messages,
        )
        return AnswerResponse(await self._link.start(answer, messages))

    async def chat_completions(self, request: Request) -> Response:
        body = await self._bodies.read(request, ChatBody)
        adapter = self._models.adapter_for(body.model, body.lora_path)
        use = self._tools.use_of(body)
        message = chat_message(
            body,
            adapter,
            self._defaults,
            finds_calls=use.make_parser is not None,
            forced_schema=use.schema,
        )
        answer = ChatAnswer(
            body,
            model=body.model or self._models.base,
            request_id=request_id_of(request, body.request_id),
            codec=self._link.codec,
            make_parser=use.make_parser,
        )
        return AnswerResponse(await self._link.start(answer, [message]))
