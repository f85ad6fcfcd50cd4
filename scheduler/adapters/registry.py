"""The registry of adapter names, and what the inspection of their files found.

A version is one version of one name. A request is bound to the version that its name meant when the
request arrived, so no answer comes from two adapters.

The registry alone knows what a name means; clients remember nothing. A request that brings a folder
gets what lies there now: a stamp of the files that differs from the version's makes a new version.
A request that brings none gets what the name means.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterator

from loraplex.scheduler.adapters import store_names
from loraplex.scheduler.adapters.owners import AdapterOwners, check_owner
from loraplex.scheduler.adapters.version import AdapterState, AdapterVersion, failure
from loraplex.scheduler.frontend_protocol import AdapterSource
from loraplex.scheduler.request import RequestRefused
from loraplex.scheduler.worker_protocol import AdapterInspected, InspectAdapter


class AdapterRegistry:
    """Name -> version.

    Args:
        max_pages: pages of the pool that adapters and requests can own.
        owners: counts the names that are registered here.
        send: takes an InspectAdapter for the workers.
        on_unused: called with a content hash that no name and no request refers to any more.
        on_replaced: called with a version before it loses its name, and with the version that takes
            its place, if there is one.
    """

    def __init__(
        self,
        *,
        max_pages: int,
        owners: AdapterOwners,
        send: Callable[[InspectAdapter], None],
        on_unused: Callable[[str], None],
        on_replaced: Callable[[AdapterVersion, AdapterVersion | None], None],
    ) -> None:
        self._max_pages = max_pages
        self._owners = owners
        self._send = send
        self._on_replaced = on_replaced
        self._on_unused = on_unused
        self._by_name: dict[str, AdapterVersion] = {}
        self._by_hash: dict[str, list[AdapterVersion]] = {}  # READY, named or in use
        self._inspecting: dict[tuple[str, str], deque[AdapterVersion]] = {}
        self._num_created = 0

    def __len__(self) -> int:
        return len(self._by_name)

    def __iter__(self) -> Iterator[AdapterVersion]:
        return iter(self._by_name.values())

    def names(self) -> list[str]:
        return list(self._by_name)

    def current(self, name: str) -> AdapterVersion | None:
        """The version that a name means now, if there is one."""
        return self._by_name.get(name)

    def with_hash(self, content_hash: str) -> list[AdapterVersion]:
        return self._by_hash.get(content_hash, [])

    def register(self, name: str, source: AdapterSource, tenant: str) -> AdapterVersion:
        """Register a folder, to be read on first use.

        The same folder again changes nothing, unless its files have changed or reading them has
        failed.

        Raises:
            RequestRefused: the tenant has too many names, or the name means another folder and is
                not its own.
        """
        version = self._by_name.get(name)
        if version and version.is_at(source) and version.state is not AdapterState.FAILED:
            return self._renew(version, source)
        owner = self._owners.owner_after(version, source, tenant)
        version = self._create(name, source, owner)
        self._set_current(version)
        return version

    def load(
        self, name: str, source: AdapterSource, reply_key: Hashable, tenant: str
    ) -> AdapterVersion:
        """Inspect a folder now.

        The name keeps its version until the new one is READY. Where it has none, or a failed one,
        new requests wait for the new version. RequestRefused as by register().
        """
        current = self._by_name.get(name)
        owner = self._owners.owner_after(current, source, tenant)
        version = self._create(name, source, owner)
        version.reply_keys.append(reply_key)
        if current is None or current.state is AdapterState.FAILED:
            self._set_current(version)
        self.inspect_once(version)
        return version

    def unload(self, name: str, tenant: str) -> AdapterVersion:
        """Forget a name; requests bound to its versions keep them."""
        version = self.find(name, tenant)
        check_owner(version, tenant, "unload")
        del self._by_name[version.name]
        self._owners.remove(version)
        self._take_name(version, None)
        return version

    def find(self, name: str, tenant: str = "") -> AdapterVersion:
        """Return what a name means now for a tenant; RequestRefused if it is unknown."""
        version = store_names.visible(self._by_name, name, tenant)
        if version is None:
            raise store_names.unknown_adapter(name, self._by_name)
        return version

    def resolve(
        self,
        name: str,
        source: AdapterSource | None = None,
        tenant: str = "",
        *,
        load_inplace: bool = False,
    ) -> AdapterVersion:
        """Return the version for a new request; register `source` if the name is unknown.

        Args:
            source: the folder that the request brings, None if it brings none.
            load_inplace: the folder may replace another one.

        Raises:
            RequestRefused: the name is unknown or means another folder, or its files could not be
                read and have not changed since; or as by register().
        """
        if source is None:
            version = self.find(name, tenant)
        elif source.is_from_store:
            version = self._resolve_found(name, source, tenant)
        else:
            version = self._resolve(name, source, tenant, load_inplace)
        if version.state is AdapterState.FAILED:
            raise RequestRefused(
                "adapter",
                f"{failure(version, tenant=tenant)}; mend it, then load it again or send its path "
                "with a request",
            )
        return version

    def _resolve(
        self, name: str, source: AdapterSource, tenant: str, load_inplace: bool
    ) -> AdapterVersion:
        version = self._by_name.get(name)
        if version is not None and version.is_at(source):
            return self._renew(version, source)
        if version is not None and not load_inplace:
            own = f"the folder {version.source.named}" if version.is_open_to(tenant) else "another"
            raise RequestRefused(
                "adapter",
                f"adapter {name!r} is {own}, not {source.named}: "
                "choose another name, unload this one, or replace it with load_inplace=True",
            )
        return self.register(name, source, tenant)

    def _resolve_found(self, name: str, source: AdapterSource, tenant: str) -> AdapterVersion:
        """Return the version of a folder that was found in a store under this name."""
        registered = self._by_name.get(name)
        if registered is not None and store_names.goes_before_stores(registered, tenant):
            return registered
        key, owner = store_names.found_name(name, registered, source, tenant)
        version = self._by_name.get(key)
        if version is None:
            self._owners.check_room(owner)
        elif version.is_at(source):
            return self._renew(version, source)
        version = self._create(key, source, owner)
        self._set_current(version)
        return version

    def _renew(self, version: AdapterVersion, source: AdapterSource) -> AdapterVersion:
        """Return the version of the files as they are now: another one if they have changed."""
        if source.stamp in ("", version.source.stamp):
            return version
        if version.state is AdapterState.REGISTERED:  # nothing was read yet
            version.source = source
            return version
        newer = self._create(version.name, source, version.owner)
        self._set_current(newer)
        return newer

    def bind(self, version: AdapterVersion, now: float) -> None:
        """Count a request of this version; the first one causes the inspection of the files."""
        version.num_requests += 1
        version.last_use = now
        self.inspect_once(version)

    def inspect_once(self, version: AdapterVersion) -> None:
        """Have the files inspected unless that was asked for before."""
        if version.state is AdapterState.REGISTERED:
            self._inspect(version)

    def unbind(self, version: AdapterVersion, now: float) -> None:
        version.num_requests -= 1
        version.last_use = now
        self._forget_unused(version)

    def inspecting(self, name: str, path: str) -> list[AdapterVersion]:
        """Return the versions that wait for the worker to read these files."""
        return list(self._inspecting.get((name, path), ()))

    def on_inspected(self, event: AdapterInspected) -> tuple[AdapterVersion, str]:
        """Record the answer to an InspectAdapter.

        Returns:
            The version, and the reason if it cannot become what its name means, else "".

        Raises:
            ValueError: no such inspection was asked for.
        """
        pending = self._inspecting.get((event.name, event.path))
        if not pending:
            raise ValueError(
                f"no inspection of adapter {event.name!r} at {event.path} was asked for"
            )
        version = pending.popleft()
        if pending:
            self._send(InspectAdapter(name=event.name, path=event.path))
        else:
            del self._inspecting[event.name, event.path]
        error = event.error or self._check_size(event)
        if error:
            self.fail(version, error, is_transient=event.is_transient)
            return version, failure(version)
        version.state = AdapterState.READY
        version.error = ""
        version.content_hash = event.content_hash
        version.num_pages = event.num_pages
        version.num_bytes = event.num_bytes
        version.kind = event.kind
        version.max_rank = event.max_rank
        version.modules = list(event.modules)
        version.warnings = list(event.warnings)
        version.invocation_tokens = event.invocation_tokens
        version.num_tokens = event.num_tokens
        self._by_hash.setdefault(version.content_hash, []).append(version)
        refusal = self._promote(version)
        self._forget_unused(version)
        return version, refusal

    def fail(self, version: AdapterVersion, error: str, *, is_transient: bool) -> None:
        """Mark a version as FAILED. After a transient error the next request tries it again."""
        version.error = error
        if is_transient:
            if version.state is not AdapterState.READY:
                version.state = AdapterState.REGISTERED
            return
        if version.state is AdapterState.READY:
            self._drop_hash(version)
        version.state = AdapterState.FAILED

    def fail_load(self, version: AdapterVersion, error: str) -> None:
        """Mark a version as FAILED whose files could not be read again, or hold something else now.

        If it has its name, the next request has the files inspected anew. The list shows `error`
        until then.
        """
        self.fail(version, error, is_transient=False)
        if version.is_named:
            again = self._create(version.name, version.source, version.owner)
            again.generation = version.generation  # a load that is under way is still newer
            again.error = error
            self._set_current(again)

    def _promote(self, version: AdapterVersion) -> str:
        """Let an inspected version serve its name; returns the reason if it cannot."""
        if version.is_named:
            return ""
        current = self._by_name.get(version.name)
        if current is None:
            return f"adapter {version.name!r} was unloaded while it was being read"
        if current.generation > version.generation:
            return f"adapter {version.name!r} was replaced while it was being read"
        self._set_current(version)
        return ""

    def _check_size(self, event: AdapterInspected) -> str:
        if not event.content_hash:
            return "the worker sent neither an error nor a content hash"
        if event.num_pages >= self._max_pages:
            return (
                f"it needs {event.num_pages} pages and a request at least one more, but the pool "
                f"has {self._max_pages}; enlarge the pool"
            )
        return ""

    def _create(self, name: str, source: AdapterSource, owner: str) -> AdapterVersion:
        if not name or not source.path:
            raise RequestRefused("bad_request", "an adapter needs a name and a path")
        self._num_created += 1
        return AdapterVersion(name=name, source=source, generation=self._num_created, owner=owner)

    def _set_current(self, version: AdapterVersion) -> None:
        old = self._by_name.get(version.name)
        self._by_name[version.name] = version
        version.is_named = True
        if old is None:
            self._owners.add(version)
        else:
            version.usage = old.usage
            version.last_use = old.last_use
            self._take_name(old, version)

    def _take_name(self, version: AdapterVersion, successor: AdapterVersion | None) -> None:
        self._on_replaced(version, successor)
        version.is_named = False
        self._forget_unused(version)

    def _inspect(self, version: AdapterVersion) -> None:
        """Have the files read, after the reads of the same files that were asked for before.

        Two reads at a time could be answered in the wrong order.
        """
        version.state = AdapterState.INSPECTING
        pending = self._inspecting.setdefault((version.name, version.path), deque())
        pending.append(version)
        if len(pending) == 1:
            self._send(InspectAdapter(name=version.name, path=version.path))

    def _forget_unused(self, version: AdapterVersion) -> None:
        unused = not version.is_named and not version.num_requests
        if unused and version.state is AdapterState.READY:
            self._drop_hash(version)

    def _drop_hash(self, version: AdapterVersion) -> None:
        """Forget the hash of a version; does nothing the second time."""
        versions = self._by_hash.get(version.content_hash, [])
        if version in versions:
            versions.remove(version)
            if not versions:
                del self._by_hash[version.content_hash]
                self._on_unused(version.content_hash)

    def check_integrity(self) -> None:
        """Raise IntegrityError unless each tenant's names are counted."""
        self._owners.check_integrity(self)
