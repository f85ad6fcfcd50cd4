"""Measures streams over HTTP beside the same streams over ZeroMQ, from one engine.

Both entrances detokenize. The clients are processes that do little with what they read, and are
connected before they send. All requests are sent at once, or spread over some seconds. Runs over
the two entrances take turns.

    python benchmarks/http.py --model llama-3-8b --tokenizer /models/llama --out out.jsonl
"""

import argparse
import asyncio
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraplex import AsyncClient, RequestOutputKind, SamplingParams
from loraplex.engine.config import EngineConfig, ModelConfig
from loraplex.engine.processes.engine import Engine
from loraplex.entrypoints.bench import dummy
from loraplex.entrypoints.bench.results import Results

ENTRANCES = ("zmq", "http")


@dataclass(frozen=True, slots=True)
class Load:
    """The requests of one run, divided among client processes."""

    address: str
    num_streams: int
    prompt_len: int
    answer_len: int
    num_clients: int
    vocab_size: int
    spread_s: float  # over which the requests begin


@dataclass(slots=True)
class Stream:
    """Seconds by the machine's monotonic clock."""

    sent: float = 0.0
    first: float = 0.0
    last: float = 0.0

    def on_output(self) -> None:
        self.last = time.monotonic()
        self.first = self.first or self.last


async def over_zmq(load: Load, prompts: Sequence[list[int]]) -> list[Stream]:
    params = SamplingParams(
        max_tokens=load.answer_len, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )

    async def one(client: AsyncClient, index: int) -> Stream:
        prompt = prompts[index]
        await asyncio.sleep(load.spread_s * index / len(prompts))
        stream = Stream(sent=time.monotonic())
        num_tokens = 0
        async for output in client.generate(prompt, params):
            stream.on_output()
            num_tokens += len(output.outputs[0].token_ids)
        assert num_tokens == load.answer_len
        return stream

    async with AsyncClient(load.address) as client:
        await client.health()
        return await asyncio.gather(*(one(client, i) for i in range(len(prompts))))


async def over_http(load: Load, prompts: Sequence[list[int]]) -> list[Stream]:
    host, _, port = load.address.rpartition(":")

    connections = [await asyncio.open_connection(host, int(port)) for _ in prompts]

    async def one(index: int) -> Stream:
        reader, writer = connections[index]
        body = json.dumps({
            "model": "base", "prompt": prompts[index], "max_tokens": load.answer_len,
            "stream": True, "ignore_eos": True, "stream_options": {"include_usage": True},
        }).encode()  # fmt: skip
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        await asyncio.sleep(load.spread_s * index / len(prompts))
        stream = Stream(sent=time.monotonic())
        writer.write(head.encode() + body)
        last = b""
        async for line in reader:
            if line.startswith(b"data: {"):
                last = line
                if b'"choices":[{' in line:
                    stream.on_output()
        usage = json.loads(last[6:])["usage"]
        assert usage["completion_tokens"] == load.answer_len
        writer.close()
        return stream

    return await asyncio.gather(*map(one, range(len(prompts))))


def run_client(entrance: str, load: Load, seed: int, start: Any, results: Any) -> None:
    """Send this client's share once all clients are ready, and hand back its streams."""
    chooser = random.Random(seed)
    prompts = [
        [chooser.randrange(load.vocab_size) for _ in range(load.prompt_len)]
        for _ in range(load.num_streams // load.num_clients)
    ]
    start.wait()
    run = over_zmq if entrance == "zmq" else over_http
    results.put(asyncio.run(run(load, prompts)))


def measure(entrance: str, load: Load, seed: int) -> dict[str, float]:
    """Returns the figures of one run."""
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(load.num_clients), context.Queue()
    clients = [
        context.Process(target=run_client, args=(entrance, load, seed + i, start, results))
        for i in range(load.num_clients)
    ]
    for client in clients:
        client.start()
    streams = [stream for _ in clients for stream in results.get(timeout=300)]
    for client in clients:
        client.join()
    seconds = max(s.last for s in streams) - min(s.sent for s in streams)
    first = sorted(s.first - s.sent for s in streams)
    return {
        "new_tokens_per_s": round(len(streams) * load.answer_len / seconds, 1),
        "first_token_ms_p50": round(1e3 * statistics.median(first), 2),
    }


def configure(args: argparse.Namespace, folder: Path) -> EngineConfig:
    """Returns an engine with random weights, in the shapes of a known model."""
    model = ModelConfig(model=args.model, tokenizer=args.tokenizer, device=args.device)
    if args.model in dummy.MODELS:
        path = dummy.write_model(folder / args.model, args.model)
        shapes = dummy.model_config(args.model)
        if args.vocab_size:
            shapes["vocab_size"] = args.vocab_size
            (path / "config.json").write_text(json.dumps(shapes))
        model = replace(model, model=str(path), load_format="dummy")
    config = EngineConfig(model=model)
    memory = replace(config.memory, num_pages=args.num_pages)
    server = replace(
        config.server, endpoint="", http="127.0.0.1:0", served_model_name="base",
        max_client_backlog=1 << 18,
    )  # fmt: skip
    return replace(config, memory=memory, server=server)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="a folder, or a name of random weights")
    parser.add_argument("--tokenizer", required=True, help="a folder with tokenizer.json")
    parser.add_argument("--vocab-size", type=int, help="of random weights, as the tokenizer's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--num-pages", type=int)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--clients", type=int, default=4, help="processes that share the streams")
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--answer-len", type=int, default=256)
    parser.add_argument("--spread", type=float, default=5.0, help="seconds; the other runs: 0")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = Results(args.out, None, lambda rows: [])
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as folder:
        engine = Engine(configure(args, Path(folder)))
        engine.start()
        with engine:
            addresses = {"zmq": engine.endpoint, "http": engine.http_endpoint}
            load = Load(
                "", args.streams, args.prompt_len, args.answer_len, args.clients,
                engine.info.vocab_size, 0.0,
            )  # fmt: skip
            cases = [(e, spread) for spread in (0.0, args.spread) for e in ENTRANCES]
            runs: dict[tuple[str, float], list[dict[str, float]]] = {case: [] for case in cases}
            for repeat in range(args.repeats + 1):
                for number, (entrance, spread_s) in enumerate(cases):
                    its = replace(load, address=addresses[entrance], spread_s=spread_s)
                    figures = measure(entrance, its, seed=1000 * (4 * repeat + number))
                    print(entrance, f"{spread_s:g} s", figures, flush=True)
                    if repeat:  # the first runs warm up
                        runs[entrance, spread_s].append(figures)
            row: dict[str, Any] = {
                "benchmark": "benchmarks/http.py", "model": args.model,
                "device": engine.info.workers[0].device, "streams": args.streams,
                "clients": args.clients, "prompt_len": args.prompt_len,
                "answer_len": args.answer_len, "repeats": args.repeats, "spread_s": args.spread,
            }  # fmt: skip
    for (entrance, spread_s), all_figures in runs.items():
        when = "spread" if spread_s else "at_once"
        for name in all_figures[0]:
            median = statistics.median(run[name] for run in all_figures)
            row[f"{entrance}_{when}_{name}"] = round(median, 2)
    print(json.dumps(row, indent=1))
    results.write(row)


if __name__ == "__main__":
    main()
