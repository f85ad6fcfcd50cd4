"""Gives an engine on another node than the router's the folders of adapters."""

import secrets
from collections.abc import Sequence

from loraplex.engine.cluster.files.folder_server import FolderServer
from loraplex.engine.cluster.files.node_files import FileSource, NodeFiles
from loraplex.engine.cluster.files.session_folder import SessionFolder
from loraplex.engine.stores.disk_cache import DiskCache


class NodeFolders:
    """Serves copies of the router's adapters to one engine, from a cache of the whole node.

    Attributes:
        address: the socket of ChildStart.folder_server.
    """

    def __init__(
        self,
        source: FileSource,
        *,
        session: str,
        max_bytes: int,
        adapter_roots: Sequence[str] = (),
    ) -> None:
        """Args are those of SessionFolder, DiskCache and NodeFiles.

        Raises OSError if the folder for temporary files cannot be used.
        """
        self._session = SessionFolder(session)
        try:
            cache = DiskCache(self._session.path / "copies", max_bytes)
            path = str(self._session.path / f"{secrets.token_hex(4)}.sock")
            self._server = FolderServer(NodeFiles(source, cache, adapter_roots), path)
        except BaseException:
            self._session.close()
            raise
        self.address = path

    def close(self) -> None:
        """Ends the server, and removes the copies if no other engine of the node uses them."""
        self._server.close()
        self._session.close()
