"""Measures how soon new weights of a trainer are served, and what that costs other requests.

A batch decodes, each request with an adapter of its own. Another process, the trainer, holds an
adapter's tensors on the same device. It changes them, loads them into the engine under one name,
and sends a short request. Three cases of one batch each:

quiet:  the trainer does nothing.
probes: it sends the requests, and loads nothing.
pushes: it loads new weights before each request.

    python benchmarks/push_adapter.py --model llama-3-8b
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from loraplex import Client, SamplingParams
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError
from loraplex.entrypoints.bench.measure import check_complete, percentiles, step_times
from loraplex.entrypoints.bench.names import MODULES
from loraplex.entrypoints.bench.panels import latency_panels
from loraplex.entrypoints.bench.results import Results, Row, Table
from loraplex.entrypoints.bench.session import BenchSession, open_session
from loraplex.entrypoints.bench.setup import RandomAdapters
from loraplex.entrypoints.bench.traces import closed_batch
from loraplex.entrypoints.cli.bench_flags import (
    adapter_flags,
    add_flag,
    make_script_parser,
    repeats_flag,
)
from loraplex.entrypoints.cli.command import run_command
from loraplex.entrypoints.cli.flag_types import positive, positive_int

DESCRIPTION = "Time loads of a trainer's tensors while a batch decodes."
CASES = ("quiet", "probes", "pushes")
NAME = "pushed"
PROBE = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, detokenize=False)


def trainer(pipe: Connection, endpoint: str, folder: str, device: str, prompt_len: int) -> None:
    """Run the other process: answers each (case, seconds between two probes) with times in s."""
    import torch
    from safetensors.torch import load_file

    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    tensors = load_file(Path(folder) / "adapter_model.safetensors", device=device)
    client = Client(endpoint)

    def update() -> None:
        for tensor in tensors.values():
            tensor.mul_(1.01)
        if device != "cpu":
            torch.cuda.synchronize()

    def probe(number: int) -> None:
        next(iter(client.generate([1 + number % 200] * prompt_len, PROBE, adapter=NAME)))

    client.load_adapter_tensors(NAME, config, tensors)
    probe(0)
    number = 0
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        case, interval_s = order
        times: list[tuple[float, float]] = []  # until the load was answered, until the first token
        while not pipe.poll(interval_s):
            number += 1
            if case == "pushes":
                update()
            started = time.perf_counter()
            if case == "pushes":
                client.load_adapter_tensors(NAME, config, tensors)
            loaded = time.perf_counter()
            probe(number)
            times.append((loaded - started, time.perf_counter() - started))
        pipe.recv()
        pipe.send(times)
    client.close()


@contextmanager
def running_trainer(session: BenchSession, prompt_len: int) -> Iterator[Connection]:
    """Start the other process and wait until it has loaded its adapter once."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    _, folder = session.adapters[-1]
    device = "cpu" if session.engine.info.workers[0].device == "cpu" else "cuda"
    arguments = (theirs, session.engine.endpoint, folder, device, prompt_len)
    process = context.Process(target=trainer, args=arguments, daemon=True)
    process.start()
    theirs.close()  # so that recv() fails if the process dies
    assert ours.recv() == "ready"
    yield ours
    ours.send(None)
    process.join()


def run(args: argparse.Namespace, config: EngineConfig) -> int:
    """Measure each case `repeats` times, in turn."""
    if config.adapter.adapters or config.adapter.adapter_dir:
        raise ConfigError("this benchmark writes its own adapters: name none")
    if config.scheduler.max_num_seqs <= args.batch:
        raise ConfigError(f"--max-num-seqs must exceed --batch, {args.batch}")
    with open_session(
        config,
        args.batch + 1,
        random=RandomAdapters(args.ranks, args.lora_modules, args.weight_files),
        results=Results(args.out, args.plot, latency_panels),
        hold_all=True,
    ) as session:
        setup = {"bench": "push_adapter", "batch": args.batch, "prompt_len": args.prompt_len,
                 "answer_len": args.answer_len, "interval_s": args.interval}  # fmt: skip
        table = Table(
            case=-7, run=4, num_probes=11, load_ms_p50=12, load_ms_p99=12, first_token_ms_p50=19,
            first_token_ms_p99=19, step_ms=9, step_ms_p99=12, p99_over_quiet=15,
            p99_over_probes=16,
        )  # fmt: skip
        with running_trainer(session, args.prompt_len) as pipe:
            session.warm_up(_trace(args))
            for number in range(args.repeats):
                p99: dict[str, float] = {}
                for case in CASES:
                    row = _measure(args, session, pipe, case)
                    over = {f"p99_over_{k}": round(row["step_ms_p99"] / v - 1, 4)
                            for k, v in p99.items()}  # fmt: skip
                    p99[case] = row["step_ms_p99"]
                    row = {"case": case, "run": number, **row, **over}
                    table.add(row)
                    session.write({**setup, **row})
    return 0


def _trace(args: argparse.Namespace) -> list[Any]:
    return list(
        closed_batch(
            args.batch,
            "distinct",
            num_prompt_tokens=args.prompt_len,
            num_new_tokens=args.answer_len,
        )
    )


def _measure(args: argparse.Namespace, session: BenchSession, pipe: Connection, case: str) -> Row:
    trace = _trace(args)
    if case != "quiet":
        pipe.send((case, args.interval))
    timelines = session.measure(trace, title=case)
    check_complete(timelines, trace)
    times: list[tuple[float, float]] = []
    if case != "quiet":
        pipe.send("stop")
        times = pipe.recv()
    loads = [load for load, _ in times] if case == "pushes" else []
    return {
        "num_probes": len(times),
        **percentiles("load_ms", loads),
        **percentiles("first_token_ms", [first for _, first in times]),
        **step_times(timelines),
    }


def _add_flags(group: Any) -> None:
    adapter_flags(group, ranks=[16], modules=list(MODULES))
    add_flag(group, "--batch", positive_int, 64, "N", "requests that decode meanwhile")
    add_flag(group, "--prompt-len", positive_int, 128, "N", "tokens of every prompt")
    add_flag(group, "--answer-len", positive_int, 1024, "N", "tokens of an answer of the batch")
    add_flag(group, "--interval", positive, 0.25, "S", "seconds between two probes")
    repeats_flag(group, 3)


def make_parser() -> argparse.ArgumentParser:
    return make_script_parser(DESCRIPTION, _add_flags, run)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
