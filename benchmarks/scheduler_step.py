"""Measures a step of the scheduler's process, and how late other work can make a plan.

Runs the real scheduler loop on a CPU. The worker is replaced by one that answers every plan at
once, the sockets by lists of encoded messages; encoding and decoding are the real ones.

    python benchmarks/scheduler_step.py [--label after]

prints a table and appends to benchmarks/results/scheduler_step_cpu.jsonl. Times are CPU time of the
thread, so waiting for a core does not count. A step's figures are medians over the turns of a
round; the round with the least sum is kept, because other work on the machine can only add to it.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import time
from array import array
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loraplex.engine.ipc import codec
from loraplex.engine.ipc.messages.frontend import (
    AdapterCommand,
    AdapterReply,
    EngineInfo,
    StatsQuery,
    StatsReply,
)
from loraplex.engine.processes.scheduler_loop import SchedulerLoop
from loraplex.engine.processes.worker_group import WorkerGroup
from loraplex.memory.config import MemoryConfig
from loraplex.scheduler.config import SchedulerConfig
from loraplex.scheduler.frontend_protocol import AdapterSource, AddRequest
from loraplex.scheduler.scheduler import Scheduler
from loraplex.scheduler.worker_protocol import (
    AdapterInspected,
    AdapterLoaded,
    InspectAdapter,
    LoadAdapter,
    SamplingSpec,
    StepPlan,
    StepResult,
    WorkerCommand,
    WorkerReady,
    int_array,
)

RESULTS = Path(__file__).parent / "results" / "scheduler_step_cpu.jsonl"
PARTS = ("plan", "commit", "wrap", "encode", "decode")
FRONTEND, WORKER = b"frontend-0", b"worker-0"
PROMPT_TOKENS = 300
TURNS = 100  # of one round
NUM_PAGES = 40_000
NUM_ADAPTERS, NUM_RESIDENT, BURST = 10_000, 1_000, 1_024
SAMPLING = SamplingSpec(
    temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, seed=0, repetition_penalty=1.0,
    presence_penalty=0.0, frequency_penalty=0.0, max_tokens=3_000, min_tokens=0,
    stop_token_ids=int_array([2]), num_logprobs=-1, num_prompt_logprobs=-1,
    bias_token_ids=int_array(), bias_values=array("f"),
)  # fmt: skip
READY = WorkerReady(
    rank=0, num_pages=NUM_PAGES, page_bytes=1, num_layers=1, max_model_len=4096, vocab_size=32_000,
    device="cpu", lora_backend="", attention_backend="", base_fingerprint="base",
)  # fmt: skip

Seconds = dict[str, float]


class TimedScheduler(Scheduler):
    """Adds the seconds of planning and committing to `seconds`."""

    seconds: Seconds

    def plan(self) -> StepPlan | None:
        start = time.thread_time()
        plan = super().plan()
        self.seconds["plan"] += time.thread_time() - start
        return plan

    def commit(self, result: StepResult) -> Any:
        start = time.thread_time()
        outputs = super().commit(result)
        self.seconds["commit"] += time.thread_time() - start
        return outputs


class TimedChannel:
    """Keeps encoded messages in lists; adds the seconds of encoding and decoding to `seconds`."""

    def __init__(self, seconds: Seconds) -> None:
        self._seconds = seconds
        self.inbox: deque[tuple[bytes, bytes]] = deque()
        self.sent: list[bytes] = []

    def send(self, message: object, peer: bytes = b"") -> None:
        start = time.thread_time()
        self.sent.append(codec.encode(message))
        self._seconds["encode"] += time.thread_time() - start

    def send_encoded(self, data: bytes, peer: bytes) -> None:
        self.sent.append(data)

    def receive(self, limit: int = 1024) -> list[tuple[bytes, Any]]:
        start = time.thread_time()
        count = min(limit, len(self.inbox))
        taken = [self.inbox.popleft() for _ in range(count)]
        messages = [(peer, codec.decode(data)) for peer, data in taken]
        self._seconds["decode"] += time.thread_time() - start
        return messages


class TimedWorkers(WorkerGroup):
    """A group of one worker; adds the seconds of encoding commands to `seconds`."""

    seconds: Seconds

    def send(self, command: WorkerCommand) -> None:
        start = time.thread_time()
        super().send(command)
        self.seconds["encode"] += time.thread_time() - start


class Rig:
    """A scheduler loop whose worker answers at once."""

    def __init__(self, max_num_seqs: int, num_pages: int = NUM_PAGES) -> None:
        self.seconds: Seconds = defaultdict(float)
        self._results: deque[StepResult] = deque()
        memory = MemoryConfig()
        self.scheduler = TimedScheduler(
            config=SchedulerConfig(max_num_seqs=max_num_seqs),
            memory=memory,
            num_pages=num_pages,
            max_model_len=READY.max_model_len,
            base_fingerprint=READY.base_fingerprint,
        )
        self.scheduler.seconds = self.seconds
        self.frontends, self.workers = TimedChannel(self.seconds), TimedChannel(self.seconds)
        info = EngineInfo(
            max_model_len=READY.max_model_len,
            vocab_size=READY.vocab_size,
            num_pages=num_pages,
            block_tokens=memory.block_tokens,
            max_queue_len=16_384,
            workers=[READY],
        )
        group = TimedWorkers(self.workers, 1)
        group.seconds = self.seconds
        self.loop = SchedulerLoop(
            self.scheduler, info=info, frontends=self.frontends, workers=group
        )

    def ask(self, first_id: int, count: int, adapter: Callable[[int], str] = lambda i: "") -> None:
        for index in range(first_id, first_id + count):
            prompt = array("i", [(index * 7 + place) % 1000 for place in range(PROMPT_TOKENS)])
            message = AddRequest(index, prompt, SAMPLING, adapter(index))
            self.post(message)

    def post(self, message: object) -> None:
        self.frontends.inbox.append((FRONTEND, codec.encode(message)))

    def turn(self) -> tuple[float, int]:
        """Returns the seconds of one turn of the loop, and the tokens that its results brought."""
        self.seconds.clear()
        start = time.thread_time()
        self.loop.turn()
        seconds = time.thread_time() - start
        return seconds, self._answer()

    def _answer(self) -> int:
        """Run one step, and every other command; returns the tokens that the step sampled."""
        for data in self.workers.sent:
            command = codec.decode(data)
            match command:
                case StepPlan():
                    token_ids = int_array([5] * sum(command.samples))
                    self._results.append(StepResult(command.step_id, token_ids, step_us=1))
                case InspectAdapter():
                    name = command.name
                    self._reply(
                        AdapterInspected(
                            name, command.path, content_hash=name, num_pages=2, num_bytes=2,
                            max_rank=8, modules=["q_proj", "k_proj", "v_proj", "o_proj"],
                        )
                    )  # fmt: skip
                case LoadAdapter():
                    self._reply(AdapterLoaded(command.adapter_slot, command.content_hash))
        self.workers.sent.clear()
        if not self._results:
            return 0
        result = self._results.popleft()
        self._reply(result)
        return len(result.token_ids)

    def _reply(self, event: object) -> None:
        self.workers.inbox.append((WORKER, codec.encode(event)))


def step_cost(num_rows: int, rounds: int) -> dict[str, float]:
    """Milliseconds of each part of one decode step of `num_rows` rows."""
    rig = Rig(max_num_seqs=256)
    rig.ask(0, num_rows)
    for _ in range(40):
        rig.turn()
    _freeze()
    best: dict[str, float] = {}
    for _ in range(rounds):
        turns: dict[str, list[float]] = defaultdict(list)
        for _ in range(TURNS):
            total, num_sampled = rig.turn()
            if num_sampled != num_rows:
                continue
            rig.seconds["wrap"] += total - sum(rig.seconds.values())
            for part in PARTS:
                turns[part].append(rig.seconds[part])
            turns["sum"].append(total)
        found = {part: 1e3 * statistics.median(turns[part]) for part in (*PARTS, "sum")}
        if not best or found["sum"] < best["sum"]:
            best = found
    return best


def delay(
    post: Callable[[Rig, int], None], *, rounds: int, num_pages: int = NUM_PAGES
) -> dict[str, float]:
    """Milliseconds by which the work that `post` asks for holds up planning, at most in one turn.

    64 requests decode all the while. The delay of a turn is all of it but plan() and commit();
    `calm` is its median without other work. The round with the shortest delay is kept.
    """
    rig = Rig(max_num_seqs=256, num_pages=num_pages)
    for index in range(NUM_ADAPTERS):
        rig.scheduler.register_adapter(
            f"adapter-{index:05}", AdapterSource.at(f"/adapters/{index:05}")
        )
    for first in range(0, NUM_RESIDENT, 64):
        for number in range(first, min(first + 64, NUM_RESIDENT)):
            rig.post(AddRequest(number, int_array([3] * 8), one_token(), f"adapter-{number:05}"))
        for _ in range(20):
            rig.turn()
    rig.ask(100_000, 64)
    for _ in range(40):
        rig.turn()
    _freeze()
    calm = statistics.median(_delay_of_turn(rig) for _ in range(TURNS))
    best: dict[str, float] = {}
    for number in range(rounds):
        rig.frontends.sent.clear()
        post(rig, number)
        waits = bool(len(rig.frontends.inbox) == 1)
        delays = [_delay_of_turn(rig)]
        while rig.frontends.inbox or (waits and not _is_answered(rig)):
            delays.append(_delay_of_turn(rig))
        found = {"calm": 1e3 * calm, "longest": 1e3 * max(delays), "num_turns": len(delays)}
        if not best or found["longest"] < best["longest"]:
            best = found
    return best


def _freeze() -> None:
    """Freezes the objects that exist, as scheduler_main does after its start."""
    gc.collect()
    gc.freeze()


def _delay_of_turn(rig: Rig) -> float:
    seconds, _ = rig.turn()
    return seconds - rig.seconds["plan"] - rig.seconds["commit"]


def _is_answered(rig: Rig) -> bool:
    """Whether the last part of a reply has come, in messages that are dropped then."""
    messages = [codec.decode(data) for data in rig.frontends.sent]
    rig.frontends.sent.clear()
    return any(isinstance(m, StatsReply | AdapterReply) for m in messages)


def one_token() -> SamplingSpec:
    values = {name: getattr(SAMPLING, name) for name in SamplingSpec.__annotations__}
    return SamplingSpec(**{**values, "max_tokens": 1})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--label", default="after", help="name of these lines in the results")
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    setup = {
        "label": args.label, "machine": "2-core CPU machine, shared",
        "python": platform.python_version(),
        "rounds": args.rounds, "turns": TURNS, "prompt_tokens": PROMPT_TOKENS, "frontends": 1,
        "unit": "ms of CPU time, medians of the best round", "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip
    lines: list[dict[str, Any]] = []
    print(f"{'rows':>5} " + " ".join(f"{part:>8}" for part in (*PARTS, "sum")) + "   ms a step")
    for num_rows in (1, 64, 256):
        cost = step_cost(num_rows, args.rounds)
        lines.append({"question": "step", "rows": num_rows, **_rounded(cost), **setup})
        print(f"{num_rows:>5} " + " ".join(f"{cost[part]:8.3f}" for part in (*PARTS, "sum")))
    cases: dict[str, Callable[[Rig, int], None]] = {
        f"stats, {NUM_ADAPTERS} adapters": lambda rig, _: rig.post(StatsQuery(1)),
        f"metrics, {NUM_ADAPTERS} adapters": lambda rig, _: rig.post(StatsQuery(1, by_tier=True)),
        f"list of {NUM_ADAPTERS} adapters": lambda rig, _: rig.post(AdapterCommand(1, "list")),
        f"burst of {BURST} requests": lambda rig, n: rig.ask((n + 1) * 1_000_000, BURST),
    }
    for question, post in cases.items():
        found = delay(post, rounds=5)
        print(
            f"{question}: plans are held up by {found['longest']:.2f} ms at most "
            f"({found['calm']:.2f} without), over {found['num_turns']} turns"
        )
        lines.append({"question": question, **_rounded(found), **setup})
    with RESULTS.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


if __name__ == "__main__":
    main()
