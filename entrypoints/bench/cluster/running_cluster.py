"""Connects a benchmark with a cluster that runs already."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError
from loraplex.engine.ipc.messages.frontend import EngineInfo
from loraplex.entrypoints.bench.measure import MEASURED
from loraplex.entrypoints.bench.results import Results
from loraplex.entrypoints.bench.session import BenchSession, ConnectedEngine, make_session
from loraplex.entrypoints.bench.setup import BenchSetup, machine_row
from loraplex.entrypoints.client.sync_client import Client


@contextmanager
def connect_running(
    args: argparse.Namespace, config: EngineConfig, results: Results
) -> Iterator[BenchSession]:
    """Yields a session over the cluster at `args.endpoint`, with the adapters that it knows.

    Raises:
        ConfigError: a flag asks for what only a cluster of the benchmark's own has, a single engine
            answers, or it knows too few adapters.
    """
    if args.kill or args.engines:
        raise ConfigError(
            "--engines and --kill are for a cluster that the benchmark starts: leave them out, or "
            "leave --endpoint out"
        )
    with Client(args.endpoint) as client:
        router, health = client.stats().get("router"), client.health()
        if router is None:
            raise ConfigError(
                f"{args.endpoint} is a single engine, not a cluster: give --endpoint of a cluster"
            )
        adapters = [(row["name"], row["path"] or "") for row in client.list_adapters()]
        if len(adapters) < args.num_adapters:
            raise ConfigError(
                f"the cluster at {args.endpoint} knows {len(adapters)} adapters, and the benchmark "
                f"needs {args.num_adapters}: load more, or lower --num-adapters"
            )
        limit = health["max_requests_per_client"]
        info = EngineInfo(
            max_model_len=health["max_model_len"],
            vocab_size=health["vocab_size"],
            num_pages=health["num_pages"],
            block_tokens=health["block_tokens"],
            max_queue_len=limit,
            workers=[],
        )
        config = replace(config, server=replace(config.server, max_requests_per_client=limit))
        config = replace(config, model=replace(config.model, skip_tokenizer_init=True))
        setup = BenchSetup(config, adapters, health["model"], {})
        row = {**machine_row(), "model": health["model"], "measured": MEASURED}
        row |= {"placement": router["placement"]}
        engine = ConnectedEngine(args.endpoint, info, client)
        yield make_session(setup, engine, row, results)
