"""A day in miniature: 2,000 adapters, skewed traffic, and all that can happen to adapters.

The short runs last until everything that can happen has happened; the long runs find more, and see
whether memory grows.
"""

import os
import random
import signal
from pathlib import Path

import pytest

from loraplex.engine.config import AdapterConfig
from loraplex.engine.errors import EngineDeadError
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.entrypoints.client.outputs import RequestFailure
from loraplex.entrypoints.client.sync_client import Client

from helpers.fakes.fake_engine import expected_tokens, fake_config, make_fake_adapter
from helpers.running.processes import assert_gone, make_engine, start_engine
from helpers.scheduling.day_fake import POLICIES, FakeDay
from helpers.scheduling.day_real import RealDay

MAX_GROWTH = 16 << 20  # bytes, of the process
LONG = pytest.mark.long


def check_flat(rss: list[int]) -> float:
    """The last quarter of a day needs what the second one did; returns the growth in MiB."""
    quarter = len(rss) // 4
    growth = max(rss[-quarter:]) - max(rss[quarter : 2 * quarter])
    assert growth < MAX_GROWTH, f"the process grew by {growth >> 10} KiB"
    return growth / (1 << 20)


@pytest.mark.parametrize("num_actions", [2500, pytest.param(20_000, marks=LONG)])
@pytest.mark.parametrize("policy", POLICIES)
def test_scheduler_over_a_fake_worker(policy: str, num_actions: int) -> None:
    """Outputs are the oracle's, all counts balance after every operation, no request starves."""
    day = FakeDay(policy, seed=len(policy))
    day.run(num_actions)
    growth = check_flat(day.rss)
    stats = day.scheduler.stats()
    day.end()
    tally = day.harness.tally
    report = {
        "policy": policy, "turns": day.harness.turns, "longest wait in turns": tally.longest_wait,
        "growth in MiB": round(growth, 1), **dict(sorted(tally.counts.items())),
        "loads": stats["num_adapter_loads"], "evictions": stats["num_adapter_unloads"],
        "preemptions": stats["num_preemptions"], "hits": stats["adapter_usage"]["hits"],
    }  # fmt: skip
    print(report)
    for key in ("stop", "length", "abort", "adapter", "loaded", "load refused", "pinned",
                "pin refused", "unloaded", "refused: unknown_adapter"):  # fmt: skip
        assert tally.counts.get(key), f"no {key}"
    assert all(report["hits"].values()) and report["preemptions"]


@pytest.mark.parametrize("num_actions", [400, pytest.param(8000, marks=LONG)])
def test_whole_engine_over_real_files(tmp_path: Path, num_actions: int) -> None:
    """Outputs are those of Hugging Face with the adapter merged into its weights."""
    day = RealDay(tmp_path, seed=11)
    day.run(num_actions)
    growth = check_flat(day.rss)
    stats = day.client.stats()
    day.end()
    report = {
        "growth in MiB": round(growth, 1), "longest wait in actions": day.longest_wait,
        **dict(sorted(day.counts.items())), "loads": stats["num_adapter_loads"],
        "evictions": stats["num_adapter_unloads"], "preemptions": stats["num_preemptions"],
        "usage": stats["adapter_usage"],
    }  # fmt: skip
    print(report)
    for key in ("length", "abort", "loaded", "bad loads", "unloaded", "pinned", "unknown"):
        assert day.counts[key], f"no {key}"
    assert all(stats["adapter_usage"]["hits"].values())


@pytest.mark.e2e
@pytest.mark.parametrize("num_rounds", [1, pytest.param(10, marks=LONG)])
def test_engines_that_are_killed_and_started_again(tmp_path: Path, num_rounds: int) -> None:
    """Whichever process dies, each request ends once: with the oracle's tokens, or dead."""
    rng = random.Random(5)
    names = [f"adapter-{index:02d}" for index in range(60)]
    for name in names:
        make_fake_adapter(tmp_path / name, f"content {int(name[-2:]) // 2}")
    config = fake_config(adapter=AdapterConfig(adapter_dir=str(tmp_path)))
    num_done = num_dead = 0
    for victim in ("worker 0", "scheduler", "frontend 0") * num_rounds:
        engine = make_engine(config, "--delay", "0.003")
        left = start_engine(engine)
        try:
            with Client(engine.endpoint) as client:
                done, dead = live_until_killed(client, rng, names, engine.pids[victim])
        finally:
            engine.stop()
        assert_gone(left)
        num_done, num_dead = num_done + done, num_dead + dead
    print({"done": num_done, "dead": num_dead})
    assert num_done and num_dead


def live_until_killed(
    client: Client, rng: random.Random, names: list[str], pid: int
) -> tuple[int, int]:
    """Kills `pid` after 40 answers; returns how many requests were answered and how many failed."""
    asked: dict[str, tuple[list[int], str]] = {}
    params = SamplingParams(max_tokens=20, temperature=0.0)
    for _ in range(150):
        prompt, name = [rng.randrange(9) for _ in range(rng.randint(1, 20))], rng.choice(names)
        asked[client.submit(prompt, params, adapter=name)] = (prompt, name)
    num_done = num_dead = 0
    while client.num_outstanding:
        for result in client.poll(120.0):
            prompt, name = asked.pop(result.request_id)  # a second end is a KeyError
            if isinstance(result, RequestFailure):
                assert isinstance(result.error, EngineDeadError), result
                num_dead += 1
            else:
                content = f"content {int(name[-2:]) // 2}"
                want = expected_tokens(prompt, content, max_tokens=20)
                assert result.outputs[0].token_ids == want
                num_done += 1
                if num_done == 40:
                    os.kill(pid, signal.SIGKILL)
    assert not asked, "requests were lost"
    return num_done, num_dead
