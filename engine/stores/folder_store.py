"""Finds adapters in the folders of this machine. Their files are read where they lie."""

import os

from loraplex.engine.adapters.folder_lookup import find_folder
from loraplex.engine.adapters.paths import ADAPTER_FILE, expanded
from loraplex.engine.store_config import TENANT
from loraplex.engine.stores.adapter_store import FoundAdapter
from loraplex.engine.stores.deadline import Deadline
from loraplex.engine.stores.store_address import StoreAddress, check_name
from loraplex.engine.stores.store_source import store_source


class FolderStore:
    """Takes an adapter NAME from FOLDER/NAME. Links that lead out of the folder are refused.

    Workers refuse such links again when they open the files (adapter_roots() names the folder), as
    a tenant may exchange files at any time.
    """

    def __init__(self, address: StoreAddress) -> None:
        self._address = address
        self.root = address.root

    def find(self, name: str, tenant: str, deadline: Deadline) -> FoundAdapter | None:
        """Finds as AdapterStore.find does."""
        check_name(name)
        folder = self._address.folder(tenant)
        if folder is None:
            return None
        path = os.path.join(folder, name)
        if not os.path.isfile(os.path.join(path, ADAPTER_FILE)):
            return None
        found = find_folder(path, folder)  # refuses links out of the folder
        inside = os.path.relpath(found.path, expanded(folder))
        own = os.path.join(self._address.real_folder.replace(TENANT, tenant), inside)
        owner = tenant if self._address.is_private else ""
        return FoundAdapter(store_source(path, own, owner))
