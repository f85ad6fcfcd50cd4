"""systemd hears when a server is ready."""

import socket
from pathlib import Path

import pytest

from helpers.running.processes import GUARD_S
from helpers.serving.served_command import FAKE, serving

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("is_abstract", [False, True])
def test_systemd_is_told_once(tmp_path: Path, is_abstract: bool) -> None:
    name = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name if is_abstract else name)
        manager.settimeout(GUARD_S)
        with serving(*FAKE, NOTIFY_SOCKET="@" + name if is_abstract else name) as server:
            assert manager.recv(100) == b"READY=1"
            assert server.is_ready() == 200
            server.signal()
            assert server.wait() == (0, "")
        manager.setblocking(False)
        with pytest.raises(BlockingIOError):
            manager.recv(100)
