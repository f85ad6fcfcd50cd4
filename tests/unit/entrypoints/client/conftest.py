from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex.engine.config import AdapterConfig

from helpers.fakes.fake_engine import make_fake_adapter
from helpers.fakes.in_process_client import InProcessClient


@pytest.fixture
def client(tmp_path: Path) -> Iterator[InProcessClient]:
    """A client whose engine may load the adapters "a" and "b" in `tmp_path`."""
    for name in ("a", "b"):
        make_fake_adapter(tmp_path / name, f"content of {name}")
    with InProcessClient(adapter=AdapterConfig(adapter_root=str(tmp_path))) as client:
        yield client
        client.engine.scheduler.check_integrity()
