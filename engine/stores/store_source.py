"""Describes a folder from a store for the scheduler."""

from loraplex.engine.adapters.folder_lookup import stamp_folder
from loraplex.scheduler.frontend_protocol import AdapterSource


def store_source(named: str, path: str, owner: str) -> AdapterSource:
    """Returns the source with a stamp of the files as they are now.

    Args:
        named: the address in the store, which stays the same when the files change.
        path: the folder that holds the files.
        owner: the only tenant that may use it; empty: all may.
    """
    return AdapterSource(
        named=named, path=path, stamp=stamp_folder(path), is_from_store=True, owner=owner
    )
