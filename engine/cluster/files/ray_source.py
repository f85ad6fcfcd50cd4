"""Reads files of the router's node from another node."""

from typing import Any

from loraplex.engine.cluster.files.adapter_files import FilePiece, FolderFile

CALL_LIMIT_S = 30.0


class RaySource:
    """Asks a FilesActor. Usable from any thread of a process that is connected with Ray."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def list_files(self, path: str) -> list[FolderFile]:
        files: list[FolderFile] = _result(self._actor.list_files.remote(path))
        return files

    def read(self, path: str, file: FolderFile, start: int) -> FilePiece:
        (reference,) = _result(self._actor.put.remote(path, file, start))
        piece: FilePiece = _result(reference)
        return piece


def _result(reference: Any) -> Any:
    """Returns a value. Raises OSError, the actor's own or one for what went wrong on the way."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError

    try:
        return ray.get(reference, timeout=CALL_LIMIT_S)
    except RayTaskError as error:
        if isinstance(error.cause, OSError):
            raise error.cause from None
        raise OSError(f"the router's node failed: {error.cause!r}") from error
    except GetTimeoutError:
        raise TimeoutError(f"the router's node sent nothing for {CALL_LIMIT_S:g} s") from None
    except RayError as error:  # the object is lost, or its node
        text = str(error).strip().partition("\n")[0]
        raise OSError(f"the router's node cannot be asked: {text}") from error
