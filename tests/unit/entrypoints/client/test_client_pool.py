"""The map of the pool that a client asks for, against the counts beside it."""

from loraplex import Client, SamplingParams
from loraplex.engine.processes.in_process import InProcessEngine

from helpers.fakes.fake_engine import FakeEngineWorker, fake_config


def test_a_client_may_ask_for_a_map_of_the_pool() -> None:
    with Client(InProcessEngine(fake_config(), worker=FakeEngineWorker)) as client:
        stream = client.generate([5] * 40, SamplingParams(max_tokens=100))
        next(stream)
        assert "pools" not in client.stats()
        (small,) = client.stats(pool_cells=50)["pools"]
        stats = client.stats(pool_cells=399)
        stream.close()
    assert (small["num_pages"], small["pages_per_cell"], sum(small["runs"][1::2])) == (399, 8, 50)
    (pool,) = stats["pools"]
    assert pool["pages_per_cell"] == 1
    cells = dict.fromkeys(range(3), 0)
    for code, count in zip(pool["runs"][::2], pool["runs"][1::2], strict=True):
        cells[code] += count
    assert [cells[0], cells[1], cells[2]] == [
        stats[f"pages_{kind}"] for kind in ("free", "kv", "prefix")
    ]
    assert cells[1] > 0
