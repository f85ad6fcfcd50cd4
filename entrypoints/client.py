"""The clients of an engine: `Client` for plain code, `AsyncClient` for asyncio."""

from loraplex.entrypoints.client_async import AsyncClient
from loraplex.entrypoints.client_sync import Client

__all__ = ["AsyncClient", "Client"]
