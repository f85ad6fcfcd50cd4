"""The engine's configuration: a frozen dataclass of parts, one for each concern.

The help texts are also the configuration reference.
"""

import math
from dataclasses import dataclass, field

from loraplex.backends.config import BackendConfig
from loraplex.engine.store_config import StoreConfig
from loraplex.memory.config import MemoryConfig
from loraplex.scheduler.config import SchedulerConfig

DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
QUANTIZATIONS = ("auto", "fp8")
DEVICES = ("auto", "cpu", "cuda")
MAX_FRONTENDS = 64


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The base model, and how to load it."""

    model: str = field(
        default="",
        metadata={
            "help": "directory or GGUF file of the model; empty: the packaged SmolLM2-135M-Instruct"
        },
    )
    tokenizer: str = field(
        default="",
        metadata={
            "help": "directory or file of the tokenizer; empty: the one in the model directory"
        },
    )
    skip_tokenizer_init: bool = field(
        default=False, metadata={"help": "load no tokenizer; prompts and answers are token ids"}
    )
    chat_template: str = field(
        default="", metadata={"help": "Jinja file that replaces the model's chat template"}
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "type of weights and KV cache; auto: the checkpoint's, float32 on a CPU",
                  "choices": DTYPES},
    )  # fmt: skip
    load_format: str = field(
        default="auto",
        metadata={
            "help": "format of the weights; auto: detected; dummy: random weights",
            "choices": LOAD_FORMATS,
        },
    )
    quantization: str = field(
        default="auto",
        metadata={
            "help": "form of the projections' weights; auto: the checkpoint's; fp8: rounded to "
            "8 bits while they load",
            "choices": QUANTIZATIONS,
        },
    )
    max_model_len: int | None = field(
        default=None,
        metadata={
            "help": "longest prompt and answer together, in tokens; default: the model's limit"
        },
    )
    device: str = field(
        default="auto",
        metadata={"help": "device of the workers; auto: a GPU if there is one", "choices": DEVICES},
    )
    seed: int = field(default=0, metadata={"help": "seed of requests that set no seed"})

    def __post_init__(self) -> None:
        for name, allowed in (
            ("dtype", DTYPES), ("load_format", LOAD_FORMATS), ("device", DEVICES),
            ("quantization", QUANTIZATIONS),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.max_model_len is not None and self.max_model_len < 1:
            raise ValueError(f"max_model_len must be positive, got {self.max_model_len}")


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """The number of GPUs that share one model."""

    tensor_parallel_size: int = field(
        default=1,
        metadata={
            "help": "GPUs that share the model, one worker each; on a CPU, processes that share it"
        },
    )

    def __post_init__(self) -> None:
        if self.tensor_parallel_size < 1:
            raise ValueError(
                f"tensor_parallel_size must be positive, got {self.tensor_parallel_size}"
            )


@dataclass(frozen=True, slots=True)
class ProcessConfig:
    """How the engine watches its own processes."""

    watchdog_timeout: float = field(
        default=300.0,
        metadata={
            "help": "seconds after which a process that is busy without progress counts as hung; "
            "0: watch no process, for debuggers"
        },
    )

    def __post_init__(self) -> None:
        if not 0 <= self.watchdog_timeout < math.inf:
            raise ValueError(
                f"watchdog_timeout must be a number of seconds, or 0, got {self.watchdog_timeout}"
            )


@dataclass(frozen=True, slots=True)
class GraphConfig:
    """Limits of the CUDA graphs of decode steps and small mixed steps, captured at start."""

    enforce_eager: bool = field(
        default=False,
        metadata={"help": "capture no CUDA graphs: the engine starts sooner and runs slower"},
    )
    graph_bytes: int = field(default=2 << 30, metadata={"help": "largest GPU memory of all graphs"})
    graph_seconds: float = field(
        default=30.0, metadata={"help": "longest time to spend on capturing graphs"}
    )

    def __post_init__(self) -> None:
        if self.graph_bytes < 0 or self.graph_seconds < 0:
            raise ValueError("graph_bytes and graph_seconds must not be negative")


@dataclass(frozen=True, slots=True)
class ProfileConfig:
    """Profiles of steps; off unless `profile_dir` is set."""

    profile_dir: str = field(
        default="",
        metadata={
            "help": "directory for a JSON line per step, and for timelines; empty: no profile"
        },
    )
    profile_steps: int = field(
        default=0, metadata={"help": "steps in one timeline of torch.profiler; 0: no timelines"}
    )
    profile_every: int = field(
        default=500, metadata={"help": "steps between the starts of two timelines"}
    )

    def __post_init__(self) -> None:
        if self.profile_steps < 0 or self.profile_every < 1:
            raise ValueError("profile_steps must not be negative, profile_every must be positive")
        if self.profile_steps and not self.profile_dir:
            raise ValueError("profile_steps needs profile_dir, the directory for the timelines")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The adapters that are registered at start, and where clients may load more from."""

    adapters: tuple[tuple[str, str], ...] = field(
        default=(), metadata={"help": "adapter to register: NAME=PATH of a PEFT folder; repeatable",
                              "flag": "--adapter"}
    )  # fmt: skip
    adapter_mixes: tuple[tuple[str, str], ...] = field(
        default=(),
        metadata={
            "help": "mix to serve under a name: NAME=ADAPTER:WEIGHT,ADAPTER:WEIGHT; the weight is "
            "1 unless given; repeatable",
            "flag": "--adapter-mix",
            "metavar": "NAME=ADAPTER:WEIGHT,...",
        },
    )
    adapter_dir: str = field(
        default="",
        metadata={"help": "folder whose PEFT directories are registered under their own names"},
    )
    adapter_root: str = field(
        default="",
        metadata={"help": "the only folder that clients may load adapters from; empty: no folder"},
    )


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The addresses for clients, ZeroMQ and HTTP, and their limits."""

    endpoint: str = field(
        default="tcp://127.0.0.1:5599",
        metadata={"help": "address that clients connect to: tcp://HOST:PORT or ipc://PATH"},
    )
    http: str = field(
        default="",
        metadata={"help": "address of the OpenAI-compatible HTTP server, HOST:PORT; empty: none"},
    )
    num_frontends: int = field(
        default=1,
        metadata={
            "help": "processes that serve clients at endpoint, and as many at http; connections "
            "are shared out among them"
        },
    )
    served_model_name: str = field(
        default="",
        metadata={"help": "name of the base model in HTTP requests; empty: the value of model"},
    )
    kv_events_config: str = field(
        default="",
        metadata={
            "help": "JSON object with vLLM's names (enable_kv_cache_events, endpoint, "
            "replay_endpoint, topic, ...): where events about cached prompts are published; empty: "
            "nowhere"
        },
    )
    server_secret_key_file: str = field(
        default="",
        metadata={"help": "file with the CurveZMQ secret key; a public address requires it"},
    )
    client_public_keys_dir: str = field(
        default="",
        metadata={
            "help": "folder of the clients' CurveZMQ public keys; empty: any key is accepted"
        },
    )
    api_keys: str = field(
        default="",
        metadata={
            "help": "YAML or JSON file of the tenants: their API keys for HTTP, weights and "
            "limits; read again on SIGHUP; empty: HTTP asks for no key"
        },
    )
    insecure: bool = field(
        default=False,
        metadata={
            "help": "allow a public address without encryption, and an endpoint without keys "
            "beside api_keys"
        },
    )
    max_message_bytes: int = field(
        default=16 << 20, metadata={"help": "largest message that a client may send"}
    )
    allow_adapter_upload: bool = field(
        default=False,
        metadata={"help": "let clients send adapters' tensors over TCP; an ipc:// endpoint does"},
    )
    max_client_backlog: int = field(
        default=8192,
        metadata={"help": "unread messages of one client after which its requests are cancelled"},
    )
    max_requests_per_client: int = field(
        default=4096,
        metadata={
            "help": "largest number of unfinished requests of one client, "
            "each of the n answers counted"
        },
    )
    request_timeout: float = field(
        default=0.0,
        metadata={
            "help": "longest time of a request, in seconds; 0: as long as it takes. "
            "Its own timeout_s can only shorten it"
        },
    )
    drain_grace: float = field(
        default=0.0,
        metadata={
            "help": "seconds after a signal to stop for which new requests are accepted still, "
            "while /ready says 503"
        },
    )
    drain_timeout: float = field(
        default=20.0,
        metadata={
            "help": "longest time for running requests to end after that, in seconds; the rest fail"
        },
    )

    def __post_init__(self) -> None:
        for name in ("request_timeout", "drain_grace", "drain_timeout"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} must be a number of seconds, or 0, got {getattr(self, name)}"
                )
        if not 1 <= self.num_frontends <= MAX_FRONTENDS:
            raise ValueError(
                f"num_frontends must be from 1 to {MAX_FRONTENDS}, got {self.num_frontends}"
            )

    @property
    def has_keys(self) -> bool:
        """Tells whether there are files that say which clients are known."""
        return bool(self.api_keys or self.client_public_keys_dir)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The whole configuration of one engine; the supervisor sends it to each process on a pipe."""

    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    process: ProcessConfig = field(default_factory=ProcessConfig)
    graph: GraphConfig = field(default_factory=GraphConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
