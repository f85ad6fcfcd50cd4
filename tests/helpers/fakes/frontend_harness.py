"""Runs a frontend with a scheduler that only records, and clients that may be gone or slow."""

import select
from array import array
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import msgspec

from loraplex.engine.config import EngineConfig, ModelConfig
from loraplex.engine.frontend.clients import ClientTable
from loraplex.engine.frontend.frontend import Frontend
from loraplex.engine.frontend.inputs import TextCodec, load_text_codec
from loraplex.engine.frontend.uploads.adapter_uploads import AdapterUploads
from loraplex.engine.ipc.channel import PeerGoneError, SlowPeerError, Wakeup
from loraplex.engine.ipc.messages.frontend import EngineInfo, StatsReply
from loraplex.scheduler.frontend_protocol import SequenceOutput, StepOutputs

from helpers.models.hf_models import make_tokenizer

A, B = b"client-a", b"client-b"
INFO = EngineInfo(
    max_model_len=64, vocab_size=384, num_pages=9, block_tokens=16, max_queue_len=9, workers=[]
)


WITHIN_S = 120.0  # only a test that hangs gets there


class FrontendHarness:
    """Keeps what the frontend sends in `sent` and `replies` until the test takes it.

    Attributes:
        keys: the tenants whose keys the clients hold, None for one that was revoked; any other
            client is the operator's.
        now_s: the time that the frontend sees.
        scheduler_room: how many more messages the scheduler takes, None for any number.
        scheduler_error: what a send to the scheduler raises, None for no error.
    """

    def __init__(
        self, codec: TextCodec | None, *, max_model_len: int = INFO.max_model_len, **parts: Any
    ) -> None:
        self.sent: list[Any] = []  # to the scheduler
        self.replies: list[tuple[bytes, dict[str, Any]]] = []
        self.gone: set[bytes] = set()
        self.slow: set[bytes] = set()
        self.keys: dict[bytes, str | None] = {}
        self.now_s = 0.0
        self.scheduler_room: int | None = None
        self.scheduler_error: Exception | None = None
        self.wakeup = Wakeup()
        config = EngineConfig(**{"model": ModelConfig(model="m"), **parts})
        self.frontend = Frontend(
            config,
            name="frontend 0",
            info=msgspec.structs.replace(INFO, max_model_len=max_model_len),
            codec=codec,
            scheduler=self,
            clients_of=partial(
                ClientTable,
                self.reply,
                max_unread=config.server.max_client_backlog,
                clock=lambda: self.now_s,
            ),
            wakeup=self.wakeup,
        )
        self.frontend.tensor_loads.uploads = AdapterUploads(config, self.wakeup)

    def send(self, message: object, peer: bytes = b"") -> None:
        if self.scheduler_error is not None:
            raise self.scheduler_error
        if self.scheduler_room is not None:
            if not self.scheduler_room:
                raise SlowPeerError("the other side does not read its messages")
            self.scheduler_room -= 1
        self.sent.append(message)

    def receive(self) -> list[tuple[bytes, Any]]:
        return []

    def reply(self, client: bytes, data: bytes) -> None:
        if client in self.gone:
            raise PeerGoneError("gone")
        if client in self.slow:
            raise SlowPeerError("slow")
        self.replies.append((client, msgpack.unpackb(data)))

    def ask(self, client: bytes, kind: str = "generate", **values: Any) -> None:
        if kind == "generate" and not {"prompt", "messages"} & values.keys():
            values.setdefault("prompt_token_ids", [5, 6, 7])
        message = {"type": kind, "request_id": "r", **values}
        self.frontend.on_message(client, message, self.keys.get(client, ""))

    def output(self, sequence_id: int, token_ids: list[int], **values: Any) -> None:
        output = SequenceOutput(sequence_id, array("i", token_ids), **values)
        self.frontend.on_scheduler(StepOutputs(array("q"), array("i"), [output]))

    def take(self, client: bytes | None = None) -> list[dict[str, Any]]:
        taken = [m for c, m in self.replies if client in (None, c)]
        self.replies.clear()
        return taken

    def take_sent(self, cls: type) -> list[Any]:
        taken = [m for m in self.sent if isinstance(m, cls)]
        self.sent.clear()
        return taken

    def run_pooled(self) -> None:
        """Waits until a thread has tokenized a prompt or found a folder, and hands it on."""
        ready, _, _ = select.select([self.wakeup.fileno()], [], [], WITHIN_S)
        assert ready, "no prompt was tokenized and no folder found"
        self.wakeup.clear()
        self.frontend.run_ready()

    @property
    def stats(self) -> dict[str, int]:
        """The frontend's counters, as a client that asks for them sees them."""
        kept = self.sent, self.replies
        self.sent, self.replies = [], []
        self.ask(b"observer", "stats")
        (query,) = self.sent
        self.frontend.on_scheduler(StatsReply(query.query_id, {}))
        ((_, reply),) = self.replies
        self.sent, self.replies = kept
        counters: dict[str, int] = reply["stats"]["frontend"]
        return counters


def make_codec(path: Path) -> TextCodec:
    """Makes the small tokenizer of helpers.models.hf_models in `path`."""
    make_tokenizer(path)
    codec = load_text_codec(ModelConfig(model=str(path)))
    assert codec is not None
    return codec
