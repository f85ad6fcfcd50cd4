"""Tells systemd how a server does, by sd_notify's protocol."""

import contextlib
import os
import socket


def notify_service_manager(state: str) -> None:
    """Send a state such as "READY=1" to the socket that NOTIFY_SOCKET names.

    Does nothing where there is none, as under any other manager.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]  # a name that is no file
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(state.encode(), address)
