"""LLM over real processes and a worker without a model: order, interrupts, deaths, leftovers."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loraplex import LLM, LoRARequest, SamplingParams
from loraplex.engine.errors import (
    ClientError,
    ConfigError,
    ConnectionLostError,
    EngineDeadError,
)
from loraplex.engine.processes.engine import Engine
from loraplex.entrypoints.offline import local_engine

from helpers.fakes.fake_engine import expected_tokens, make_fake_adapter
from helpers.fakes.fake_llm import fake_workers, pids_of, start_llm
from helpers.running.processes import GUARD_S, is_alive, wait_until

pytestmark = pytest.mark.e2e

TESTS = Path(__file__).resolve().parents[1]
PARAMS = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with start_llm() as made:
        yield made


def tokens(llm: LLM, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], PARAMS, use_tqdm=False, **options
    )
    assert [o.prompt_token_ids for o in outputs] == prompts
    return [o.outputs[0].token_ids for o in outputs]


def random_prompts(num: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(384) for _ in range(rng.randint(1, 30))] for _ in range(num)]


def assert_ended(pids: Iterable[int]) -> None:
    wait_until(lambda: not any(map(is_alive, pids)))


def test_a_thousand_prompts_with_mixed_adapters(llm: LLM, tmp_path: Path) -> None:
    adapters = [LoRARequest(f"big{i}", 1, str(make_fake_adapter(tmp_path / f"{i}", f"content {i}")))
                for i in range(5)]  # fmt: skip
    prompts = random_prompts(1000)
    chosen = [None if i % 6 == 5 else adapters[i % 6] for i in range(len(prompts))]
    contents = ["" if i % 6 == 5 else f"content {i % 6}" for i in range(len(prompts))]
    assert tokens(llm, prompts, lora_request=chosen) == [
        expected_tokens(p, c, max_tokens=6) for p, c in zip(prompts, contents, strict=True)
    ]


def test_fields_of_a_result(llm: LLM, tmp_path: Path) -> None:
    adapter = LoRARequest("fields", 3, str(make_fake_adapter(tmp_path / "a", "x")))
    (output,) = llm.generate(
        {"prompt_token_ids": [5, 6, 7]},
        SamplingParams(max_tokens=4, n=2),
        lora_request=adapter,
        use_tqdm=False,
    )
    assert output.finished is True
    assert output.prompt_token_ids == [5, 6, 7]
    assert output.num_cached_tokens == 0
    assert output.lora_request is not None
    assert output.lora_request.lora_name == "fields"
    assert [o.index for o in output.outputs] == [0, 1]
    assert all(len(o.token_ids) == 4 and o.finish_reason == "length" for o in output.outputs)


def test_a_refused_prompt_leaves_the_engine_usable(llm: LLM) -> None:
    prompts: list[Any] = [{"prompt_token_ids": p} for p in random_prompts(20)]
    with pytest.raises(ClientError, match="prompt 7"):
        llm.generate([*prompts[:7], {"prompt_token_ids": [1] * 1000}, *prompts], use_tqdm=False)
    with pytest.raises(ClientError, match="tokenizer"):
        llm.generate("text", use_tqdm=False)
    assert tokens(llm, [[1, 2]]) == [expected_tokens([1, 2], max_tokens=6)]
    wait_until(lambda: is_idle(llm))


def is_idle(llm: LLM) -> bool:
    stats = llm.client.stats()
    return stats["running"] == stats["waiting"] == stats["pages_kv"] == 0


def test_an_unknown_adapter_is_refused(llm: LLM) -> None:
    with pytest.raises(ClientError, match="nobody"):
        tokens(llm, [[1], [2]], lora_request=[None, LoRARequest("nobody")])


def test_an_unreadable_adapter_is_refused_first(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(ClientError, match="broken"):
        tokens(llm, [[1]], lora_request=LoRARequest("broken", 1, str(tmp_path / "nothing")))


def test_several_threads(llm: LLM) -> None:
    results: dict[int, list[list[int]]] = {}
    prompts = {i: random_prompts(30, seed=i) for i in range(4)}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: tokens(llm, prompts[i])}))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=GUARD_S)
    assert results == {i: [expected_tokens(p, max_tokens=6) for p in prompts[i]] for i in range(4)}


def test_inside_a_running_event_loop(llm: LLM) -> None:
    async def cell() -> list[list[int]]:
        return tokens(llm, [[3, 4]])

    assert asyncio.run(cell()) == [expected_tokens([3, 4], max_tokens=6)]


def test_a_forked_child_does_not_stop_the_engine(llm: LLM) -> None:
    pid = os.fork()
    if pid == 0:
        llm.shutdown()
        os._exit(0)
    os.waitpid(pid, 0)
    assert all(is_alive(p) for p in pids_of(llm).values())


def test_a_bad_configuration_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Engine] = []

    class Spy(Engine):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(local_engine, "Engine", Spy)
    with pytest.raises(ConfigError, match="/nowhere"):
        LLM("/nowhere/model")
    assert_ended(made[0].pids.values())


def kill_when_running(llm: LLM, pid: int) -> None:
    wait_until(lambda: llm.client.stats()["running"] > 0)
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("victim", ["worker 0", "scheduler"])
def test_death_of_a_process_is_an_error_with_its_name(victim: str) -> None:
    with start_llm("--delay", "0.05") as llm:
        pids = pids_of(llm)
        killer = threading.Thread(target=kill_when_running, args=(llm, pids[victim]))
        killer.start()
        with pytest.raises(EngineDeadError, match=victim):
            llm.generate(
                [{"prompt_token_ids": p} for p in random_prompts(40)],
                SamplingParams(max_tokens=400, ignore_eos=True),
                use_tqdm=False,
            )
        killer.join()
        with pytest.raises(EngineDeadError, match=victim):
            tokens(llm, [[1]])
        assert_ended(pids.values())


def test_death_of_the_frontend_fails_one_call() -> None:
    with start_llm("--delay", "0.05") as llm:
        killer = threading.Thread(target=kill_when_running, args=(llm, pids_of(llm)["frontend 0"]))
        killer.start()
        with pytest.raises(ConnectionLostError, match="the next call connects again"):
            llm.generate(
                [{"prompt_token_ids": p} for p in random_prompts(40)],
                SamplingParams(max_tokens=400, ignore_eos=True),
                use_tqdm=False,
            )
        assert tokens(llm, [[1], [2, 3]]) == [
            expected_tokens(prompt, max_tokens=6) for prompt in ([1], [2, 3])
        ]
        wait_until(lambda: llm.client.stats()["running"] == 0)


def test_sleep_frees_the_processes_and_wake_up_brings_the_adapters_back(tmp_path: Path) -> None:
    with start_llm() as llm:
        path = str(make_fake_adapter(tmp_path / "a", "red"))
        before = pids_of(llm)
        llm.client.load_adapter("red", path)
        llm.client.pin_adapter("red")
        told = llm.generate([[5]], SamplingParams(max_tokens=4), lora_request=LoRARequest("red"))
        llm.sleep(level=1)
        assert not any(is_alive(pid) for pid in before.values())
        with pytest.raises(EngineDeadError, match="wake_up"):
            llm.generate([[5]], use_tqdm=False)
        llm.sleep()
        with fake_workers():
            llm.wake_up()
        again = llm.generate([[5]], SamplingParams(max_tokens=4), lora_request=LoRARequest("red"))
        assert again[0].outputs[0].token_ids == told[0].outputs[0].token_ids
        (row,) = llm.client.list_adapters("red")
        assert row["pinned"]


def run_script(body: str) -> tuple[int, str, list[int]]:
    """Run a script without a main guard; returns status, its output and the engine's pids."""
    process = start_script(body)
    out, _ = process.communicate(timeout=GUARD_S)
    return process.returncode, out, read_pids(out)


def start_script(body: str) -> "subprocess.Popen[str]":
    head = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's "&" ignores it
        f"sys.path.insert(0, {str(TESTS)!r})\n"
        "from helpers.fakes.fake_llm import pids_of, start_llm\n"
        "from loraplex import SamplingParams\n"
        "llm = start_llm('--delay', '0.02')\n"
        "print('PIDS', *pids_of(llm).values(), flush=True)\n"
        "long = SamplingParams(max_tokens=400, ignore_eos=True)\n"
        "prompts = [{'prompt_token_ids': [i]} for i in range(50)]\n"
    )
    return subprocess.Popen(
        [sys.executable, "-P", "-c", head + textwrap.dedent(body)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def read_pids(out: str) -> list[int]:
    (line,) = [line for line in out.splitlines() if line.startswith("PIDS")]
    return [int(word) for word in line.split()[1:]]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("llm.generate(prompts[:3], use_tqdm=False)", 0),
        ("sys.exit(3)", 3),
        ("raise RuntimeError('of the user')", 1),
        ("del llm", 0),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(600)", -signal.SIGTERM),
        ("os.kill(os.getpid(), signal.SIGKILL); time.sleep(600)", -signal.SIGKILL),
        ("os._exit(5)", 5),
    ],
)
def test_nothing_outlives_the_script(body: str, status: int) -> None:
    returncode, out, pids = run_script(body)
    assert returncode == status, out
    assert len(pids) == 3
    assert_ended(pids)


def test_ctrl_c_cancels_the_batch_and_keeps_the_engine() -> None:
    process = start_script(
        """
        from helpers.fakes.fake_engine import expected_tokens
        import threading

        def announce():
            while llm.client.stats()["running"] == 0:
                time.sleep(0.01)
            print("GO", flush=True)

        threading.Thread(target=announce).start()
        try:
            llm.generate(prompts, long, use_tqdm=False)
            print("not interrupted")
        except KeyboardInterrupt:
            (output,) = llm.generate(
                {"prompt_token_ids": [1, 2]}, SamplingParams(max_tokens=6), use_tqdm=False
            )
            assert output.outputs[0].token_ids == expected_tokens([1, 2], max_tokens=6)
            stats = llm.client.stats()
            print("STATS", stats["running"], stats["waiting"], stats["pages_kv"])
        """
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("GO"):
            process.send_signal(signal.SIGINT)
    assert process.wait(timeout=GUARD_S) == 0, "".join(lines)
    assert "STATS 0 0 0\n" in lines
    assert_ended(read_pids("".join(lines)))
