"""Finds the adapters that a request asks for, and their folders."""

from collections.abc import Callable
from functools import partial

from loraplex.engine.adapters.folder_lookup import FolderLookup
from loraplex.engine.errors import ClientError, client_error
from loraplex.engine.frontend.mixing.adapter_use import AdapterUse
from loraplex.engine.frontend.mixing.named_mixes import NamedMixes
from loraplex.engine.frontend.mixing.stored_names import StoredNames
from loraplex.engine.frontend.protocol import GenerateRequest
from loraplex.engine.stores.adapter_store import FolderLeases, FoundAdapter
from loraplex.scheduler.frontend_protocol import AdapterSource, MixPart

Found = Callable[[list[MixPart] | ClientError, FolderLeases], None]


class AdapterLookup:
    """Turns the adapters of a message into parts for the scheduler."""

    def __init__(
        self, mixes: NamedMixes, folders: FolderLookup, stored: StoredNames | None
    ) -> None:
        """`stored` finds names that come without a folder; None: there are no stores."""
        self._mixes = mixes
        self._folders = folders
        self._stored = stored

    def find(self, message: GenerateRequest, then: Found) -> None:
        """Calls `then` with the parts, none for the base model, or with the reason why not.

        It calls at once if no part names a folder and there are no stores, else maybe later. The
        callee releases the leases, which keep the parts' files where they are.
        """
        uses = self._uses(message)
        if isinstance(uses, ClientError):
            then(uses, FolderLeases())
            return
        parts = [
            MixPart(use.name, weight=use.weight, load_inplace=use.load_inplace) for use in uses
        ]
        missing = {index for index, use in enumerate(uses) if use.path or self._stored}
        if not missing:
            then(parts, FolderLeases())
            return
        sources = _Sources(parts, missing, then)
        for index, use in enumerate(uses):
            if use.path:
                self._folders.find(use.path, partial(sources.take, index))
            elif self._stored is not None:
                self._stored.find(use.name, message.tenant, partial(sources.take_found, index))

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


class _Sources:
    """Collects the folders of a request's parts until all have come or one has failed."""

    def __init__(self, parts: list[MixPart], missing: set[int], then: Found) -> None:
        self._parts = parts
        self._missing = missing  # indices of parts; empty after a failure too
        self._then = then
        self._leases = FolderLeases()

    def take(self, index: int, source: AdapterSource | ClientError | None) -> None:
        """Takes the folder of a part, None if its name is enough, or the reason why not."""
        if index not in self._missing:
            return
        self._missing.discard(index)
        if isinstance(source, ClientError):
            self._missing.clear()
            name = self._parts[index].adapter
            self._then(client_error(source.code, f"adapter {name!r}: {source}"), self._leases)
            return
        self._parts[index].source = source
        if not self._missing:
            self._then(self._parts, self._leases)

    def take_found(self, index: int, answer: FoundAdapter | ClientError | None) -> None:
        """Takes a store's answer, as take()."""
        if not isinstance(answer, FoundAdapter):
            self.take(index, answer)
            return
        lease = FolderLeases([answer.lease] if answer.lease else [])
        if index not in self._missing:
            lease.release()
            return
        self._leases += lease
        self.take(index, answer.source)
