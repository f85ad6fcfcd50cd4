"""`loraplex serve`: run an engine on an endpoint until Ctrl-C or SIGTERM."""

import loraplex
from loraplex.engine.adapters.paths import adapters_at_start
from loraplex.engine.config import EngineConfig
from loraplex.engine.ipc.log_setup import writes_json
from loraplex.engine.ipc.messages.frontend import EngineInfo
from loraplex.engine.processes.engine import Engine
from loraplex.entrypoints.cli.command import print_failure
from loraplex.entrypoints.cli.output.server_output import ServerOutput
from loraplex.scheduler.worker_protocol import WorkerReady


def run(config: EngineConfig) -> int:
    """Serve until SIGINT or SIGTERM; returns 0 then, or 1 if a process died."""
    output = ServerOutput(as_json=writes_json())
    adapters = adapters_at_start(config.adapter)

    def announce(engine: Engine) -> None:
        lines = describe(engine.endpoint, config, engine.info, len(adapters))
        if engine.http_endpoint:
            lines.insert(1, f"  {'http':<9} http://{engine.http_endpoint}/v1")
            lines.insert(2, f"  {'console':<9} http://{engine.http_endpoint}/")
        output.ready(lines, endpoint=engine.endpoint, http=engine.http_endpoint)

    engine = Engine(config, on_progress=output.progress, on_status=output.status)
    try:
        status = engine.serve(on_ready=announce)
    finally:
        output.close()
    if engine.dead_reason:
        print_failure(engine.dead_reason)
    return status


def describe(endpoint: str, config: EngineConfig, info: EngineInfo, num_adapters: int) -> list[str]:
    """Lines that are printed when the server is ready: endpoint, model, pool, and what each worker
    rank holds."""
    worker = info.workers[0]
    num_usable = info.num_pages - 1  # page 0 is the null page
    pool = (
        f"{num_usable:,} pages, for adapters and up to "
        f"{num_usable * info.block_tokens:,} tokens of KV cache"
    )
    adapters = (
        f"{num_adapters:,} registered, at most {config.memory.max_adapter_slots:,} in pages at once"
    )
    rows = {
        "model": f"{config.model.model or 'SmolLM2-135M-Instruct (packaged)'}, "
        f"context of {info.max_model_len:,} tokens, loaded in {worker.load_seconds:.1f} s",
        "pool": pool,
        **{f"worker {worker.rank}": _describe_worker(worker) for worker in info.workers},
        "adapters": adapters,
        "backends": f"lora {worker.lora_backend}, attention {worker.attention_backend}, "
        f"linear {worker.linear_backend}",
    }
    title = f"loraplex {loraplex.__version__} is ready on {endpoint}"
    return [title, *(f"  {name:<9} {text}" for name, text in rows.items()), "Ctrl-C stops it."]


def _describe_worker(worker: WorkerReady) -> str:
    page_bytes = worker.page_bytes * worker.num_layers
    return (
        f"{worker.device}: weights {_size(worker.weight_bytes)}, pool "
        f"{_size(worker.num_pages * page_bytes)} in pages of {_size(page_bytes)}, "
        f"{_size(worker.adapter_bytes)} for an adapter of rank {worker.adapter_rank} on all "
        "projections"
    )


def _size(num_bytes: int) -> str:
    if num_bytes < 1 << 20:
        return f"{num_bytes / 2**10:.1f} KiB"
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes < 1 << 30 else f"{num_bytes / 2**30:.2f} GiB"
