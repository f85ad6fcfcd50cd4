"""GET /v1/models and /v1/lora_adapters, and the commands that load, unload and pin adapters."""

import asyncio
import contextlib
from typing import Any
from weakref import WeakValueDictionary

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from loraplex.entrypoints.http.answer_response import JsonResponse
from loraplex.entrypoints.http.engine_link import EngineLink
from loraplex.entrypoints.http.errors import HttpError, unknown_model
from loraplex.entrypoints.http.requests.bodies import AdapterBody, LoadAdapterBody
from loraplex.entrypoints.http.requests.body_reader import BodyReader
from loraplex.entrypoints.http.served_models import ServedModels

INVALID = "InvalidUserInput"  # vLLM's type of these errors


class AdapterRoutes:
    """Lists and changes the adapters that the engine serves."""

    def __init__(self, link: EngineLink, models: ServedModels, bodies: BodyReader) -> None:
        self._link = link
        self._models = models
        self._bodies = bodies
        # One load of a name at a time: a failed one removes the name.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def list_models(self, request: Request) -> Response:
        adapters = await self._rows()
        mixes = [self._mix_card(name) for name in self._models.mixes]
        data = [self._base_card(), *map(self._card, adapters), *mixes]
        return JsonResponse({"object": "list", "data": data})

    async def get_model(self, request: Request) -> Response:
        model = request.path_params["name"]
        name = self._models.adapter_of(model)
        if name in self._models.mixes:
            return JsonResponse(self._mix_card(name))
        return JsonResponse(self._card(await self._row(model)) if name else self._base_card())

    async def list_adapters(self, request: Request) -> Response:
        return JsonResponse({"object": "list", "data": await self._rows()})

    async def get_adapter(self, request: Request) -> Response:
        return JsonResponse(await self._row(request.path_params["name"]))

    async def load(self, request: Request) -> Response:
        body = await self._bodies.read(request, LoadAdapterBody)
        await self._load(body)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        body = await self._bodies.read(request, AdapterBody)
        await self._unload(body)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    async def pin(self, request: Request) -> Response:
        return await self._command("pin_adapter", request)

    async def unpin(self, request: Request) -> Response:
        return await self._command("unpin_adapter", request)

    async def load_as_sglang(self, request: Request) -> Response:
        body = await self._bodies.read(request, LoadAdapterBody)
        try:
            await self._load(body)
            if body.pinned:
                await self._link.ask("pin_adapter", name=body.lora_name)
        except HttpError as error:
            return self._sglang_failure(error)
        return await self._sglang_success()

    async def unload_as_sglang(self, request: Request) -> Response:
        body = await self._bodies.read(request, AdapterBody)
        try:
            await self._unload(body)
        except HttpError as error:
            return self._sglang_failure(error)
        return await self._sglang_success()

    async def _load(self, body: LoadAdapterBody) -> None:
        if not body.lora_name or not body.lora_path:
            text = "Both 'lora_name' and 'lora_path' must be provided."
            raise HttpError(400, text, kind=INVALID)
        async with self._locks.setdefault(body.lora_name, asyncio.Lock()):
            await self._load_alone(body)

    async def _load_alone(self, body: LoadAdapterBody) -> None:
        is_known = await self._is_known(body.lora_name)
        if is_known and not body.load_inplace:
            raise HttpError(
                400,
                f"The lora adapter '{body.lora_name}' has already been loaded. If you want to "
                "load the adapter in place, set 'load_inplace' to True.",
                kind=INVALID,
            )
        try:
            await self._link.ask("load_adapter", name=body.lora_name, path=body.lora_path)
        except HttpError:
            if not is_known:
                await self._drop_failed(body.lora_name)
            raise

    async def _drop_failed(self, name: str) -> None:
        """Removes the name of a load that failed: vLLM does not list it.

        Another frontend may have loaded an adapter under this name meanwhile. That one stays.
        """
        with contextlib.suppress(HttpError):
            if (await self._row(name))["error"]:
                await self._link.ask("unload_adapter", name=name)

    async def _unload(self, body: AdapterBody) -> None:
        if not body.lora_name:
            text = "'lora_name' needs to be provided to unload a LoRA adapter."
            raise HttpError(400, text, kind=INVALID)
        try:
            await self._link.ask("unload_adapter", name=body.lora_name)
        except HttpError as error:
            if error.status != 404:
                raise
            text = f"The lora adapter '{body.lora_name}' cannot be found."
            raise HttpError(404, text) from None

    async def _command(self, kind: str, request: Request) -> Response:
        body = await self._bodies.read(request, AdapterBody)
        reply = await self._link.ask(kind, name=body.lora_name)
        return JsonResponse(reply["adapters"][0])

    async def _is_known(self, name: str) -> bool:
        try:
            await self._link.ask("list_adapters", name=name)
        except HttpError as error:
            if error.status != 404:
                raise
            return False
        return True

    async def _rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = (await self._link.ask("list_adapters"))["adapters"]
        return rows

    async def _row(self, model: str) -> dict[str, Any]:
        try:
            reply = await self._link.ask("list_adapters", name=self._models.adapter_of(model))
        except HttpError as error:
            raise unknown_model(model) if error.status == 404 else error from None
        row: dict[str, Any] = reply["adapters"][0]
        return row

    def _base_card(self) -> dict[str, Any]:
        info = self._link.info
        return {
            **self._model(self._models.base, self._models.root, None),
            "max_model_len": None if info is None else info.max_model_len,
        }

    def _card(self, row: dict[str, Any]) -> dict[str, Any]:
        root = row["path"] or row["name"]  # a tenant sees the paths of its own adapters alone
        return self._model(row["name"], root, self._models.base)

    def _mix_card(self, name: str) -> dict[str, Any]:
        return self._model(name, self._models.mixes[name], self._models.base)

    def _model(self, name: str, root: str, parent: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._link.created,
            "owned_by": "loraplex",
            "root": root,
            "parent": parent,
            "permission": [],
        }

    def _sglang_failure(self, error: HttpError) -> Response:
        value = {"success": False, "error_message": str(error), "loaded_adapters": {}}
        return JsonResponse(value, 400 if error.status < 500 else error.status)

    async def _sglang_success(self) -> Response:
        adapters = {row["name"]: row["path"] for row in await self._rows()}
        value = {"success": True, "error_message": "", "loaded_adapters": adapters}
        return JsonResponse(value)
