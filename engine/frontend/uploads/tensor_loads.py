"""Runs the commands of clients that load adapters from tensors."""

from functools import partial

from loraplex.engine.errors import ClientError, client_error
from loraplex.engine.frontend.queries import QueryTable
from loraplex.engine.frontend.scheduler_link import SchedulerLink
from loraplex.engine.frontend.uploads.adapter_uploads import AdapterUploads, Frames
from loraplex.engine.frontend.uploads.upload_request import LoadAdapterTensorsRequest
from loraplex.engine.ipc.messages.frontend import AdapterCommand, AdapterMemory


class TensorLoads:
    """Passes tensors to the scheduler. Holds them until it has answered.

    Attributes:
        uploads: takes the tensors. The owner sets it; None: this entrance takes none.
    """

    def __init__(self, queries: QueryTable, scheduler: SchedulerLink) -> None:
        self.uploads: AdapterUploads | None = None
        self._queries = queries
        self._scheduler = scheduler

    def add(self, client: bytes, message: LoadAdapterTensorsRequest, frames: Frames) -> None:
        """Begins a load. Raises ClientError if its tensors are refused."""
        if self.uploads is None:
            raise client_error(
                "forbidden",
                "a cluster takes no tensors: save the adapter in a folder under its adapter_root "
                "and load that, or send the tensors to a server of one engine",
            )
        query_id = self._queries.add(client, message.tenant, message.request_id, "adapters")
        try:
            self.uploads.take(query_id, message, frames, partial(self._send, query_id, message))
        except ClientError:
            self._queries.discard(query_id)
            raise

    def run_ready(self) -> None:
        """Sends on the tensors that have been written to memory files."""
        if self.uploads is not None:
            self.uploads.run_ready()

    def on_answered(self, query_id: int) -> None:
        """Lets go of the tensors of a command that was answered, if it had any."""
        if self.uploads is not None:
            self.uploads.release(query_id)

    def close(self) -> None:
        if self.uploads is not None:
            self.uploads.close()

    def _send(
        self,
        query_id: int,
        message: LoadAdapterTensorsRequest,
        memory: AdapterMemory | ClientError,
    ) -> None:
        if query_id not in self._queries:
            self.on_answered(query_id)  # the engine has died
            return
        try:
            if isinstance(memory, ClientError):
                raise memory
            self._scheduler.send(
                AdapterCommand(query_id, "load", message.name, None, message.tenant, memory)
            )
        except ClientError as error:
            self._queries.fail(query_id, error.code, str(error))
            self.on_answered(query_id)
