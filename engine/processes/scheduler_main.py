"""``python -m loraplex.engine.processes.scheduler_main``: the scheduler's process."""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import zmq

from loraplex.engine.adapters.folder_lookup import stamp_folder
from loraplex.engine.adapters.open_file import file_reader
from loraplex.engine.adapters.paths import adapters_at_start
from loraplex.engine.adapters.tensors.kept_tensors import KeptTensors
from loraplex.engine.checkpoint.locate import resolve_model
from loraplex.engine.config import EngineConfig
from loraplex.engine.grammar.request_queue import GrammarQueue
from loraplex.engine.grammar.vocabulary import Vocabulary
from loraplex.engine.grammar.vocabulary_cache import VocabularyCache
from loraplex.engine.ipc.channel import RouterChannel
from loraplex.engine.ipc.child import Child, run_child
from loraplex.engine.ipc.descriptor_limit import raise_descriptor_limit
from loraplex.engine.ipc.messages.frontend import EngineInfo
from loraplex.engine.ipc.messages.tenants import TenantTable
from loraplex.engine.ipc.step_clock import StepClock
from loraplex.engine.kv_events.kv_event_publisher import KVEventPublisher
from loraplex.engine.kv_events.kv_events import KVEvents
from loraplex.engine.kv_events.kv_events_config import kv_events_config
from loraplex.engine.processes.adapter_deadlines import ANSWER_S, AdapterDeadlines
from loraplex.engine.processes.scheduler_loop import SchedulerLoop
from loraplex.engine.processes.status_line import StatusLine
from loraplex.engine.processes.worker_group import WorkerGroup, merge_ready
from loraplex.engine.stores.open_stores import adapter_roots
from loraplex.scheduler.config import SchedulerConfig
from loraplex.scheduler.frontend_protocol import AdapterSource, AdapterVocabulary
from loraplex.scheduler.scheduler import Scheduler
from loraplex.scheduler.worker_protocol import WorkerReady

MAX_CPU_STEP_TOKENS = 512
"""A request that comes while a step runs waits for its end; thousands of tokens take seconds."""


def run(child: Child) -> None:
    config, run_dir = child.start.config, child.start.run_dir
    context = zmq.Context()
    frontends = RouterChannel(context, f"ipc://{run_dir}/frontends")
    endpoint = frontends.bind_port(child.start.host) if child.start.host else ""
    worker_channel = RouterChannel(context, f"ipc://{run_dir}/workers")
    size, timeout_s = config.parallel.tensor_parallel_size, config.process.watchdog_timeout
    deadlines = AdapterDeadlines(size, hang_s=ANSWER_S + timeout_s if timeout_s else math.inf)
    workers = WorkerGroup(worker_channel, size, deadlines)
    poller = zmq.Poller()
    poller.register(child.wakeup.fileno(), zmq.POLLIN)
    poller.register(worker_channel.socket, zmq.POLLIN)
    while not workers.is_ready and not child.stopping:
        poller.poll()
        child.wakeup.clear()
        workers.receive()
    poller.register(frontends.socket, zmq.POLLIN)
    if not child.stopping:
        info = engine_info(config, [workers.ready[rank] for rank in sorted(workers.ready)])
        scheduler = make_scheduler(config, info, has_files=not child.start.folder_server)
        grammars = make_grammar_queue(config, info, child.wakeup.set)
        events = make_kv_events(config, context, scheduler)
        if events is not None and events.socket is not None:
            poller.register(events.socket, zmq.POLLIN)
        loop = SchedulerLoop(
            scheduler,
            info=info,
            frontends=frontends,
            workers=workers,
            grammars=grammars,
            step_clock=StepClock(f"{run_dir}/steps"),
            on_hung_rank=child.worker_hangs,
        )
        loop.tensors = make_tensor_store(config)
        gc.collect()
        gc.freeze()  # later collections skip the objects made at start
        child.activity.end()
        child.ready(endpoint=endpoint, info=info)
        status = StatusLine(scheduler.stats)
        has_more = False
        tenants = TenantTable()
        while not child.stopping:
            if child.tenants is not tenants:
                tenants = child.tenants
                scheduler.tenants.set_tenants(tenants.tenants, time.monotonic())
            waits = [0.0] if has_more else [status.due_s, loop.due_s]
            due_s = min((wait for wait in waits if wait is not None), default=None)
            poller.poll(None if due_s is None else max(0, math.ceil(1000 * due_s)))
            child.activity.begin()
            child.wakeup.clear()
            has_more = loop.turn()
            if events is not None:
                has_more |= events.turn()
            if line := status.take(scheduler.num_unfinished):
                child.status(line)
            child.activity.end()
        if grammars is not None:
            grammars.close()
    context.destroy(linger=0)


def engine_info(config: EngineConfig, workers: list[WorkerReady]) -> EngineInfo:
    """Returns the limits of the group of workers. Raises ConfigError if they do not go together."""
    group = merge_ready(workers)
    return EngineInfo(
        max_model_len=group.max_model_len,
        vocab_size=group.vocab_size,
        num_pages=group.num_pages,
        block_tokens=config.memory.block_tokens,
        max_queue_len=config.scheduler.max_queue_len,
        workers=workers,
    )


def scheduler_config(config: EngineConfig, info: EngineInfo) -> SchedulerConfig:
    """Returns the scheduler's part, with a step on a CPU held to MAX_CPU_STEP_TOKENS."""
    wanted = config.scheduler
    if all(worker.device != "cpu" for worker in info.workers):
        return wanted
    limit = max(MAX_CPU_STEP_TOKENS, wanted.max_num_seqs)
    return replace(wanted, max_num_batched_tokens=min(wanted.max_num_batched_tokens, limit))


def make_scheduler(
    config: EngineConfig,
    info: EngineInfo,
    clock: Callable[[], float] = time.monotonic,
    *,
    has_files: bool = True,
) -> Scheduler:
    """Returns a scheduler with every adapter that the configuration names.

    Without `has_files` the configuration names real paths of another machine.
    """
    scheduler = Scheduler(
        config=scheduler_config(config, info),
        memory=config.memory,
        num_pages=info.num_pages,
        max_model_len=info.max_model_len,
        base_fingerprint=info.workers[0].base_fingerprint,
        clock=clock,
    )
    adapters = adapters_at_start(config.adapter) if has_files else config.adapter.adapters
    for name, path in adapters:
        scheduler.register_adapter(name, AdapterSource(path, path, stamp_folder(path)))
    return scheduler


def make_kv_events(
    config: EngineConfig, context: "zmq.Context[Any]", scheduler: Scheduler
) -> KVEvents | None:
    """Returns what publishes the events of the prefix cache, None if they are not wanted."""
    wanted = kv_events_config(config.server)
    if not (wanted.is_enabled and config.memory.enable_prefix_caching):
        return None
    return KVEvents(scheduler.memory.kv, KVEventPublisher(context, wanted))


def make_tensor_store(config: EngineConfig) -> KeptTensors:
    """Returns an empty store of adapters in memory. Each takes two descriptors of this process."""
    raise_descriptor_limit()
    return KeptTensors(config.memory.adapter_host_bytes)


def make_grammar_queue(
    config: EngineConfig, info: EngineInfo, wakeup: Callable[[], None]
) -> GrammarQueue | None:
    """Returns the queue of constrained requests, None if the engine has no tokenizer."""
    model = config.model
    if model.skip_tokenizer_init:
        return None

    def make(own: AdapterVocabulary | None) -> Vocabulary:
        # few requests have grammars
        from loraplex.engine.tokenizer.adapter_tokenizer import load_adapter_tokenizer
        from loraplex.engine.tokenizer.loading import load_tokenizer

        path = Path(model.tokenizer or resolve_model(model.model)).expanduser()
        tokenizer = None
        if own is not None and own.folder:
            folder = Path(own.folder)
            tokenizer = load_adapter_tokenizer(
                folder, path, file_reader(folder, adapter_roots(config))
            )
        num_tokens = (own and own.num_tokens) or info.vocab_size
        return Vocabulary(tokenizer or load_tokenizer(path), num_tokens)

    return GrammarQueue(VocabularyCache(make), wakeup)


if __name__ == "__main__":
    run_child(run)
