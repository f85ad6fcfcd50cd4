"""Runs the HTTP server of a cluster: ``python -m loraplex.entrypoints.http.cluster_main``."""

from functools import partial
from typing import Any

import zmq

from loraplex.engine.cluster.engine_links import connect_engines
from loraplex.engine.ipc.child import Child, run_child
from loraplex.entrypoints.http.main import EngineSide, run
from loraplex.entrypoints.http.socket_watch import SocketWatch


def connect(child: Child, context: "zmq.Context[Any]", sockets: SocketWatch) -> EngineSide:
    """Makes this process a router: it connects with all engines of the cluster."""
    channel, links = connect_engines(child, context)
    return EngineSide(
        channel,
        has_answers=lambda: channel.has_answers or sockets.has_messages,
        follow=partial(links.follow, sockets),
    )


if __name__ == "__main__":
    run_child(partial(run, connect=connect))
