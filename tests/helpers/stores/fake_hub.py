"""A hub on this machine that speaks the part of Hugging Face's API that downloads need."""

import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class FakeHub:
    """Serves repositories: metadata, lists of files, and files by ranges."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    url: str = ""
    num_files_served: int = 0

    def files(self, repo: str) -> list[dict[str, Any]]:
        """Returns the files of a repository as the API describes them."""
        return [
            {"type": "file", "path": name, "size": len(data), "oid": _hash(data)}
            for name, data in self.repos[repo].items()
        ]


class _Server(http.server.ThreadingHTTPServer):
    hub: FakeHub


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *args: Any) -> None:
        """Logs nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        repo, rest = self._parse()
        if repo in self.server.hub.repos and rest[:1] == ["paths-info"]:
            wanted = urllib.parse.parse_qs(body.decode())["paths"]
            files = self.server.hub.files(repo)
            self._json([file for file in files if file["path"] in wanted])
        else:
            self._missing("RepoNotFound")

    def do_GET(self) -> None:
        repo, rest = self._parse()
        hub = self.server.hub
        if repo not in hub.repos:
            self._missing("RepoNotFound")
        elif rest[:1] == ["resolve"]:
            self._file(hub.repos[repo].get("/".join(rest[2:])))
        elif rest[:1] == ["tree"]:
            self._json(hub.files(repo))
        else:
            self._json({"id": repo, "modelId": repo, "sha": "1" * 40, "siblings": []})

    def _parse(self) -> tuple[str, list[str]]:
        """Returns the repository and the parts of the path after it."""
        path = self.path.partition("?")[0].strip("/").removeprefix("api/models/")
        parts = path.split("/")
        return "/".join(parts[:2]), parts[2:]

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str) -> None:
        self._send(404, b"{}", {"X-Error-Code": code})

    def _file(self, data: bytes | None) -> None:
        if data is None:
            self._missing("EntryNotFound")
            return
        self.server.hub.num_files_served += 1
        span = self.headers.get("range", "")
        if not span:
            self._send(200, data, {"ETag": f'"{_hash(data)}"'})
            return
        first, last = span.removeprefix("bytes=").split("-")
        head = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
        self._send(206, data[int(first) : int(last) + 1], head)

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Runs a hub without repositories."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.hub = FakeHub(url=f"http://127.0.0.1:{server.server_address[1]}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.hub
    finally:
        server.shutdown()


def _hash(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
