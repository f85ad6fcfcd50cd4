"""Prepares the messages that load an adapter from tensors."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from loraplex.engine.adapters.tensors.memory_file import MemoryFile
from loraplex.engine.errors import ClientError
from loraplex.entrypoints.client.tensors.peft_model import config_map
from loraplex.entrypoints.client.tensors.sent_tensors import SentTensors

KIND = "load_adapter_tensors"
FRAME_BYTES = 16 << 20  # of servers that do not say what they take


class TensorLoad:
    """One load, first through memory of this machine and else through frames."""

    def __init__(self, name: str, config: Any, tensors: Mapping[str, Any]) -> None:
        """Raises TypeError for a configuration or a tensor of another type."""
        self._tensors = SentTensors(tensors)
        self._values = {"name": name, "config": config_map(config)}
        self._file: MemoryFile | None = None

    def in_memory(self) -> dict[str, Any]:
        """Writes the tensors to a memory file and returns the fields of the message."""
        self._file = self._tensors.write()
        return {**self._values, "memory": asdict(self._file.place)}

    def in_frames(self, max_bytes: int) -> tuple[dict[str, Any], list[memoryview]]:
        """Returns the fields of the message and the frames after it."""
        return self._values, self._tensors.frames(max_bytes or FRAME_BYTES)

    def close(self) -> None:
        """Frees the memory file, which the server has opened if it has answered."""
        if self._file is not None:
            self._file.close()


def is_unreachable(error: ClientError) -> bool:
    """Tells whether the server cannot open this process's memory, so that frames are needed."""
    return error.code == "unreachable_memory"
