"""Finds the adapters that a request asks for, and their folders."""

from collections.abc import Callable
from functools import partial

from loraplex.engine.adapters.folder_lookup import FolderLookup
from loraplex.engine.errors import ClientError, client_error
from loraplex.engine.frontend.mixing.adapter_use import AdapterUse
from loraplex.engine.frontend.mixing.named_mixes import NamedMixes
from loraplex.engine.frontend.protocol import GenerateRequest
from loraplex.scheduler.frontend_protocol import AdapterSource, MixPart

Found = Callable[[list[MixPart] | ClientError], None]


class AdapterLookup:
    """Turns the adapters of a message into parts for the scheduler."""

    def __init__(self, mixes: NamedMixes, folders: FolderLookup) -> None:
        self._mixes = mixes
        self._folders = folders

    def find(self, message: GenerateRequest, then: Found) -> None:
        """Calls `then` with the parts, none for the base model, or with the reason why not.

        It calls at once if no part names a folder, else after FolderLookup.run_ready().
        """
        uses = self._uses(message)
        if isinstance(uses, ClientError):
            then(uses)
            return
        parts = [
            MixPart(use.name, weight=use.weight, load_inplace=use.load_inplace) for use in uses
        ]
        missing = {index: use.path for index, use in enumerate(uses) if use.path}
        if not missing:
            then(parts)
            return

        def found(index: int, source: AdapterSource | ClientError) -> None:
            if missing.pop(index, None) is None:
                return  # another folder has failed
            if isinstance(source, ClientError):
                missing.clear()
                name = parts[index].adapter
                then(client_error(source.code, f"adapter {name!r}: {source}"))
                return
            parts[index].source = source
            if not missing:
                then(parts)

        for index, path in list(missing.items()):
            self._folders.find(path, partial(found, index))

    def _uses(self, message: GenerateRequest) -> tuple[AdapterUse, ...] | ClientError:
        if message.adapters or not message.adapter:
            return message.adapters
        mix = self._mixes.get(message.adapter)
        if mix is None:
            return (
                AdapterUse(
                    name=message.adapter,
                    path=message.adapter_path,
                    load_inplace=message.load_inplace,
                ),
            )
        if message.adapter_path:
            return ClientError(f"adapter {message.adapter!r} is a mix, which has no folder")
        return mix
