"""Prepares a benchmark's model and adapters, real or random."""

import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tqdm import tqdm

import loraplex
from loraplex.engine.adapters.paths import adapters_at_start
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import ConfigError
from loraplex.engine.ipc.messages.frontend import EngineInfo
from loraplex.entrypoints.bench import dummy
from loraplex.entrypoints.bench.measure import MEASURED
from loraplex.entrypoints.bench.results import Row

SLAB_BYTES = 256 << 20  # unit in which the host store grows
_MAX_CLIENT_BACKLOG = 1 << 18  # messages; this client reads nothing while it sends a burst


@dataclass(frozen=True, slots=True)
class RandomAdapters:
    """Shapes of the adapters that a benchmark writes where none is named."""

    ranks: Sequence[int]  # dealt to the adapters in turn
    modules: Sequence[str]  # some of names.MODULES
    num_weight_files: int  # further adapters link to one of these files


@dataclass(frozen=True, slots=True)
class BenchSetup:
    """The configuration of a benchmark's engines, and the part of its rows that describes it."""

    config: EngineConfig
    adapters: list[tuple[str, str]]  # name and path, by number
    model: str  # as it was named
    row: Row  # without the engine

    def row_of(self, info: EngineInfo) -> Row:
        """Returns the set-up of a started engine."""
        return {**machine_row(), **_engine_row(self.model, self.config, info), **self.row}


@contextmanager
def make_setup(
    config: EngineConfig, num_adapters: int, *, random: RandomAdapters, hold_all: bool = False
) -> Iterator[BenchSetup]:
    """Yields a configuration with at least `num_adapters` adapters; see open_session().

    Its random files are there until the end.

    Raises:
        ConfigError: `config` names fewer adapters.
    """
    model = config.model.model
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as folder:
        config = _with_dummy_model(config, Path(folder))
        row: Row = {"measured": MEASURED}
        if num_adapters > 0 and not adapters_at_start(config.adapter):
            config = _with_random_adapters(
                config, random, num_adapters, Path(folder), hold_all=hold_all
            )
            row |= {"ranks": list(random.ranks), "lora_modules": list(random.modules)}
        server = replace(config.server, max_client_backlog=_MAX_CLIENT_BACKLOG)
        config = replace(config, server=server)
        adapters = adapters_at_start(config.adapter)
        if len(adapters) < num_adapters:
            raise ConfigError(
                f"the benchmark needs {num_adapters} adapters, and {len(adapters)} are named"
            )
        yield BenchSetup(config, adapters, model, row)


def _with_dummy_model(config: EngineConfig, folder: Path) -> EngineConfig:
    """Replace a dummy model's name by a directory. Random weights have no tokenizer."""
    model = config.model
    if model.model in dummy.MODELS and not Path(model.model).exists():
        path = str(dummy.write_model(folder / model.model, model.model))
        model = replace(model, model=path, load_format="dummy")
    if model.load_format == "dummy":
        model = replace(model, skip_tokenizer_init=True)
    return replace(config, model=model)


def _with_random_adapters(
    config: EngineConfig,
    random: RandomAdapters,
    num_adapters: int,
    folder: Path,
    *,
    hold_all: bool,
) -> EngineConfig:
    writer = dummy.AdapterWriter(
        dummy.read_config(config.model.model),
        ranks=random.ranks,
        modules=random.modules,
        num_weight_files=random.num_weight_files,
    )
    numbers = tqdm(range(num_adapters), desc="writing adapters", disable=None, leave=False)
    pairs = tuple((f"a{i}", str(writer.write(folder / f"a{i}", i))) for i in numbers)
    adapter = replace(config.adapter, adapters=pairs, adapter_root=str(folder))
    memory = config.memory
    num_bytes = sum(map(writer.num_bytes, range(num_adapters)))
    if hold_all:
        room = num_bytes + num_bytes // 4 + SLAB_BYTES  # the last page of an adapter is not full
        memory = replace(memory, adapter_host_bytes=max(room, memory.adapter_host_bytes))
    elif num_bytes > memory.adapter_host_bytes:
        print(
            f"note: the {num_adapters} adapters take {num_bytes:,} bytes, more than the host store "
            f"({memory.adapter_host_bytes:,}), so some are read from disk again; "
            "--adapter-host-bytes enlarges it",
            file=sys.stderr,
        )
    return replace(config, adapter=adapter, memory=memory)


def machine_row() -> Row:
    """Returns the versions of what runs a benchmark."""
    versions = {"loraplex": loraplex.__version__, "python": platform.python_version()}
    for package in ("torch", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _engine_row(model: str, config: EngineConfig, info: EngineInfo) -> Row:
    worker = info.workers[0]
    return {
        **asdict(config.memory),
        **asdict(config.scheduler),
        **asdict(config.graph),
        **asdict(config.parallel),
        "model": model or "SmolLM2-135M-Instruct",
        "load_format": config.model.load_format,
        "dtype": config.model.dtype,
        "quantization": config.model.quantization,
        "device": worker.device,
        "lora_backend": worker.lora_backend,
        "attention_backend": worker.attention_backend,
        "linear_backend": worker.linear_backend,
        "num_pages": info.num_pages,
        "block_tokens": info.block_tokens,
        "load_seconds": round(worker.load_seconds, 2),
    }
