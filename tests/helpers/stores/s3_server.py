"""A real S3 server (moto's) on this machine, and a line to it that can be slow or cut."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
from moto.server import ThreadedMotoServer

KEYS = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
BUCKET = "adapters"


@dataclass
class S3Server:
    """The server's address, and a client for the tests to fill it with."""

    url: str
    client: Any

    def put(self, path: str, data: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=path, Body=data)

    def put_adapter(self, path: str, content: str = "", *, weights: bytes = b"weights") -> None:
        """Writes an adapter whose content is a text, as FakeEngineWorker reads it."""
        self.put(f"{path}/adapter_config.json", (content or f"content of {path}").encode())
        self.put(f"{path}/adapter_model.safetensors", weights)

    def put_folder(self, path: str, folder: Path) -> None:
        for file in folder.iterdir():
            self.put(f"{path}/{file.name}", file.read_bytes())

    def remove(self, path: str) -> None:
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=path)
        for entry in found.get("Contents", []):
            self.client.delete_object(Bucket=BUCKET, Key=entry["Key"])


@contextmanager
def s3_server() -> Iterator[S3Server]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    client = boto3.client("s3", endpoint_url=url, **KEYS)
    client.create_bucket(Bucket=BUCKET)
    try:
        yield S3Server(url, client)
    finally:
        server.stop()


def options_for(url: str) -> dict[str, Any]:
    """Returns options of s3fs for a server at `url`."""
    return {
        "endpoint_url": url,
        "key": "test",
        "secret": "test",
        "client_kwargs": {"region_name": "us-east-1"},
        "config_kwargs": {"retries": {"max_attempts": 1}, "connect_timeout": 2},
    }


@dataclass
class Line:
    """A TCP line to a server.

    Attributes:
        cut_after: bytes of large answers after which their connections are cut; None: never.
        num_cuts_left: answers that are still to be cut.
        bytes_per_s: speed of answers, None for any.
        is_dead: new connections are closed at once.
    """

    target: tuple[str, int]
    cut_after: int | None = None
    num_cuts_left: int = 0
    bytes_per_s: float | None = None
    is_dead: bool = False
    num_connections: int = 0
    _listener: socket.socket = field(init=False)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.num_connections += 1
            if self.is_dead:
                client.close()
                continue
            try:
                server = socket.create_connection(self.target)
            except OSError:
                client.close()
                continue
            for source, sink, is_answer in ((client, server, False), (server, client, True)):
                pump = threading.Thread(
                    target=self._pump, args=(source, sink, is_answer), daemon=True
                )
                pump.start()

    def _pump(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        num_sent = 0
        try:
            while data := source.recv(16384):
                if is_answer and self.bytes_per_s:
                    time.sleep(len(data) / self.bytes_per_s)
                sink.sendall(data)
                num_sent += len(data)
                limit = self.cut_after
                if is_answer and self.num_cuts_left and limit is not None and num_sent > limit:
                    self.num_cuts_left -= 1
                    break
        except OSError:
            pass
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


@contextmanager
def line_to(url: str) -> Iterator[Line]:
    """Opens a line to the server at `url`."""
    host, port = url.removeprefix("http://").split(":")
    line = Line((host, int(port)))
    try:
        yield line
    finally:
        line.close()
