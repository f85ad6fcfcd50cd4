"""A frontend on a test's desk: a scheduler that only listens, clients that may be gone or slow."""

from array import array
from pathlib import Path
from typing import Any

import msgpack

from loraplex.engine.config import EngineConfig, ModelConfig
from loraplex.engine.frontend.frontend import Frontend
from loraplex.engine.frontend.inputs import TextCodec, load_text_codec
from loraplex.engine.ipc.channel import PeerGoneError, SlowPeerError, Wakeup
from loraplex.engine.ipc.messages import EngineInfo, SequenceOutput, StepOutputs

from helpers.models.hf_models import make_tokenizer

A, B = b"client-a", b"client-b"
INFO = EngineInfo(
    max_model_len=64, vocab_size=384, num_pages=9, block_tokens=16, max_queue_len=9, workers=[]
)


class Desk:
    """Everything that the frontend has sent is in `sent` and `replies` until it is taken."""

    def __init__(self, codec: TextCodec | None, **parts: Any) -> None:
        self.sent: list[Any] = []  # to the scheduler
        self.replies: list[tuple[bytes, dict[str, Any]]] = []
        self.gone: set[bytes] = set()
        self.slow: set[bytes] = set()
        self.wakeup = Wakeup()
        self.frontend = Frontend(
            EngineConfig(model=ModelConfig(model="m"), **parts),
            name="frontend 0",
            info=INFO,
            codec=codec,
            scheduler=self,
            send=self.reply,
            wakeup=self.wakeup,
        )

    def send(self, message: object, peer: bytes = b"") -> None:
        self.sent.append(message)

    def receive(self) -> list[tuple[bytes, Any]]:
        return []

    def reply(self, client: bytes, message: dict[str, Any]) -> None:
        if client in self.gone:
            raise PeerGoneError("gone")
        if client in self.slow:
            raise SlowPeerError("slow")
        self.replies.append((client, msgpack.unpackb(msgpack.packb(message))))

    def ask(self, client: bytes, kind: str = "generate", **values: Any) -> None:
        if kind == "generate" and not {"prompt", "messages"} & values.keys():
            values.setdefault("prompt_token_ids", [5, 6, 7])
        self.frontend.on_message(client, {"type": kind, "request_id": "r", **values})

    def output(self, sequence_id: int, token_ids: list[int], **values: Any) -> None:
        output = SequenceOutput(sequence_id, array("i", token_ids), **values)
        self.frontend.on_scheduler(StepOutputs([output]))

    def take(self, client: bytes | None = None) -> list[dict[str, Any]]:
        taken = [m for c, m in self.replies if client in (None, c)]
        self.replies.clear()
        return taken

    def take_sent(self, cls: type) -> list[Any]:
        taken = [m for m in self.sent if isinstance(m, cls)]
        self.sent.clear()
        return taken

    @property
    def stats(self) -> dict[str, int]:
        return self.frontend._stats()


def make_codec(path: Path) -> TextCodec:
    """The little tokenizer of helpers.models.hf_models, made in `path`."""
    make_tokenizer(path)
    codec = load_text_codec(ModelConfig(model=str(path)))
    assert codec is not None
    return codec
