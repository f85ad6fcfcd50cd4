"""A router of another machine reaches an engine's scheduler over TCP."""

import time

import pytest
import zmq

from loraplex.engine.ipc.channel import DealerChannel
from loraplex.engine.ipc.messages.frontend import EngineInfo, FrontendHello

from helpers.fakes.fake_engine import fake_config
from helpers.running.processes import GUARD_S, make_engine

pytestmark = pytest.mark.e2e


def test_a_scheduler_listens_at_the_given_address() -> None:
    context = zmq.Context()
    with make_engine(fake_config(), scheduler_host="127.0.0.1") as engine:
        engine.start(GUARD_S)
        assert engine.scheduler_endpoint.startswith("tcp://127.0.0.1:")
        channel = DealerChannel(context, engine.scheduler_endpoint, b"router of the test")
        channel.send(FrontendHello("router of the test"))
        deadline = time.monotonic() + GUARD_S
        while not (messages := channel.receive()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert isinstance(messages[0][1], EngineInfo)
        channel.close()
    context.destroy(linger=0)


def test_a_scheduler_has_a_private_address_by_default() -> None:
    with make_engine(fake_config()) as engine:
        engine.start(GUARD_S)
        assert engine.scheduler_endpoint.startswith("ipc://")
