"""A day in miniature: 2,000 adapters, skewed traffic, and all that can happen to adapters.

Takes LORAPLEX_DAY_SECONDS seconds in all, 24 unless set; several minutes find more.
"""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from loraplex.engine.config import AdapterConfig
from loraplex.engine.errors import EngineDeadError
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.entrypoints.client.outputs import RequestFailure
from loraplex.entrypoints.client.sync_client import Client

from helpers.fakes.fake_engine import expected_tokens, fake_config, make_fake_adapter
from helpers.running.processes import assert_gone, leftovers, make_engine
from helpers.scheduling.day_fake import POLICIES, FakeDay
from helpers.scheduling.day_real import RealDay

SECONDS = float(os.environ.get("LORAPLEX_DAY_SECONDS", "24"))
MAX_GROWTH = 16 << 20  # bytes, of the process

pytestmark = pytest.mark.timeout(SECONDS + 240)


def check_flat(rss: list[int]) -> float:
    """The last quarter of a day needs what the second one did; returns the growth in MiB."""
    quarter = len(rss) // 4
    growth = max(rss[-quarter:]) - max(rss[quarter : 2 * quarter])
    assert growth < MAX_GROWTH, f"the process grew by {growth >> 10} KiB"
    return growth / (1 << 20)


@pytest.mark.parametrize("policy", POLICIES)
def test_scheduler_over_a_fake_worker(policy: str) -> None:
    """Outputs are the oracle's, the books balance after every operation, nobody starves."""
    day = FakeDay(policy, seed=len(policy))
    day.run(SECONDS / 6)
    growth = check_flat(day.rss)
    stats = day.scheduler.stats()
    day.end()
    tally = day.harness.tally
    report = {
        "policy": policy, "actions": day.num_actions, "turns": day.harness.turns,
        "registered in ms": round(day.register_ms), "longest wait in turns": tally.longest_wait,
        "growth in MiB": round(growth, 1), **dict(sorted(tally.counts.items())),
        "loads": stats["num_adapter_loads"], "evictions": stats["num_adapter_unloads"],
        "preemptions": stats["num_preemptions"], "hits": stats["adapter_usage"]["hits"],
    }  # fmt: skip
    print(report)
    for key in ("stop", "length", "abort", "adapter", "loaded", "load refused", "pinned",
                "pin refused", "unloaded", "refused: unknown_adapter"):  # fmt: skip
        assert tally.counts.get(key), f"no {key}"
    assert all(report["hits"].values()) and report["preemptions"]


def test_whole_engine_over_real_files(tmp_path: Path) -> None:
    """Outputs are those of Hugging Face with the adapter merged into its weights."""
    torch.set_num_threads(1)
    day = RealDay(tmp_path, seed=11)
    day.run(SECONDS / 3)
    growth = check_flat(day.rss)
    stats = day.client.stats()
    day.end()
    report = {
        "growth in MiB": round(growth, 1), "longest wait in s": round(day.longest_wait_s, 2),
        **dict(sorted(day.counts.items())), "loads": stats["num_adapter_loads"],
        "evictions": stats["num_adapter_unloads"], "preemptions": stats["num_preemptions"],
        "usage": stats["adapter_usage"],
    }  # fmt: skip
    print(report)
    for key in ("length", "abort", "loaded", "bad loads", "unloaded", "pinned", "unknown"):
        assert day.counts[key], f"no {key}"
    assert all(stats["adapter_usage"]["hits"].values())


@pytest.mark.e2e
def test_engines_that_are_killed_and_started_again(tmp_path: Path) -> None:
    """Whichever process dies, each request ends once: with the oracle's tokens, or dead."""
    rng = random.Random(5)
    names = [f"adapter-{index:02d}" for index in range(60)]
    for name in names:
        make_fake_adapter(tmp_path / name, f"content {int(name[-2:]) // 2}")
    config = fake_config(adapter=AdapterConfig(adapter_dir=str(tmp_path)))
    num_done = num_dead = 0
    until = time.monotonic() + SECONDS / 12
    for victim in ("worker 0", "scheduler", "worker 0", "frontend 0", *["worker 0"] * 1000):
        if time.monotonic() > until and num_dead:
            break
        engine = make_engine(config, "--delay", "0.003")
        engine.start(timeout_s=60)
        left = leftovers(engine)
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
    """Returns how many requests were answered, and how many died with the process `pid`."""
    asked: dict[str, tuple[list[int], str]] = {}
    params = SamplingParams(max_tokens=20, temperature=0.0)
    for _ in range(150):
        prompt, name = [rng.randrange(9) for _ in range(rng.randint(1, 20))], rng.choice(names)
        asked[client.submit(prompt, params, adapter=name)] = (prompt, name)
    num_done = num_dead = 0
    while client.num_outstanding:
        for news in client.poll(30.0):
            prompt, name = asked.pop(news.request_id)  # a second end is a KeyError
            if isinstance(news, RequestFailure):
                assert isinstance(news.error, EngineDeadError), news
                num_dead += 1
            else:
                content = f"content {int(name[-2:]) // 2}"
                want = expected_tokens(prompt, content, max_tokens=20)
                assert news.outputs[0].token_ids == want
                num_done += 1
                if num_done == 40:
                    os.kill(pid, signal.SIGKILL)
    assert not asked, "requests were lost"
    return num_done, num_dead
