"""Two routers at one address: each serves its own clients, and both know all adapters."""

import os
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest

from loraplex import Client, SamplingParams
from loraplex.engine.cluster.launch.launchers import NO_RAY
from loraplex.engine.errors import ConnectionLostError

from helpers.fakes.fake_engine import expected_tokens
from helpers.running.cluster_streams import MAX_TOKENS, fake_cluster, stream_many
from helpers.running.processes import wait_until

pytestmark = pytest.mark.e2e
PROMPT = [3, 4, 5]


def test_a_dead_router_takes_only_its_own_requests_along(tmp_path: Path) -> None:
    options = {"num_engines": 2, "num_routers": 2, "ray_address": NO_RAY}
    with fake_cluster(tmp_path, **options) as cluster, ExitStack() as stack:
        stream_many(cluster)
        clients: dict[Client, str] = {}
        while len(set(clients.values())) < 2:
            client = stack.enter_context(Client(cluster.endpoint))
            clients[client] = client.health()["instance"]
        params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
        streams = {c: c.generate(PROMPT, params, adapter="a1") for c in clients}
        for stream in streams.values():
            next(stream)
        pid = cluster.router_pid
        os.kill(pid, signal.SIGKILL)
        expected = expected_tokens(PROMPT, "content 1", max_tokens=MAX_TOKENS)
        lost = set()
        for client, stream in streams.items():
            try:
                *_, last = stream
            except ConnectionLostError:
                lost.add(clients[client])
            else:
                assert last.outputs[0].token_ids == expected
        assert len(lost) == 1, "the other router's streams go on"
        wait_until(lambda: cluster.router_pid != pid)
        stream_many(cluster)  # the new router knows the adapters
