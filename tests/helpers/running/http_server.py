"""One small real engine on the CPU behind HTTP and ZeroMQ."""

from dataclasses import dataclass
from pathlib import Path

from loraplex import Client
from loraplex.engine.config import AdapterConfig, EngineConfig, ModelConfig, ServerConfig
from loraplex.engine.processes.engine import Engine
from loraplex.memory.config import MemoryConfig
from loraplex.scheduler.config import SchedulerConfig

from helpers.models.hf_models import make_hf_model, make_tokenizer
from helpers.models.peft_adapters import make_adapter

ADAPTERS = {"a": {"r": 4, "targets": ["q_proj", "v_proj"]}, "b": {"r": 8, "targets": "all-linear"}}
BASE = "tiny"
MIX = "blend"


@dataclass(frozen=True)
class Served:
    """A running engine. `root` holds its adapters; `spare` is one that is not loaded."""

    engine: Engine
    root: Path

    @property
    def url(self) -> str:
        return f"http://{self.engine.http_endpoint}"

    def zmq(self) -> Client:
        return Client(self.engine.endpoint)


def make_models(root: Path) -> None:
    """Writes the base model, its adapters, and one adapter more under the name "spare"."""
    make_tokenizer(root / "base")
    model = make_hf_model("llama", root / "base", seed=5)
    for seed, (name, options) in enumerate((*ADAPTERS.items(), ("spare", ADAPTERS["a"]))):
        make_adapter(model, root / name, alpha=8, seed=seed, **options)


def http_config(root: Path, *, num_frontends: int = 1) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(model=str(root / "base"), device="cpu", max_model_len=512),
        memory=MemoryConfig(num_pages=600, block_tokens=16),
        scheduler=SchedulerConfig(max_num_seqs=32),
        adapter=AdapterConfig(
            adapters=tuple((name, str(root / name)) for name in ADAPTERS),
            adapter_mixes=((MIX, "a:0.5,b:-1.5"),),
            adapter_root=str(root),
        ),
        server=ServerConfig(
            endpoint="" if num_frontends == 1 else "tcp://127.0.0.1:0",
            http="127.0.0.1:0",
            served_model_name=BASE,
            num_frontends=num_frontends,
        ),
    )
