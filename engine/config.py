"""The engine's configuration: one frozen dataclass made of each folder's own."""

from dataclasses import dataclass, field

from loraplex.backends.config import BackendConfig
from loraplex.memory.config import MemoryConfig
from loraplex.scheduler.config import SchedulerConfig

DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The base model and how it is loaded."""

    model: str = field(
        default="",
        metadata={
            "help": "model directory or GGUF file; empty: the packaged SmolLM2-135M-Instruct"
        },
    )
    tokenizer: str = field(
        default="", metadata={"help": "tokenizer directory or file; empty: the model's own"}
    )
    skip_tokenizer_init: bool = field(
        default=False, metadata={"help": "serve token ids alone, load no tokenizer"}
    )
    chat_template: str = field(
        default="", metadata={"help": "Jinja file that replaces the model's chat template"}
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "type of weights and KV cache; auto: the checkpoint's, fp32 on a CPU",
                  "choices": DTYPES},
    )  # fmt: skip
    load_format: str = field(
        default="auto",
        metadata={"help": "dummy: random weights of the model's shapes", "choices": LOAD_FORMATS},
    )
    max_model_len: int | None = field(
        default=None, metadata={"help": "tokens of prompt and answer; default: the model's limit"}
    )
    device: str = field(default="auto", metadata={"help": "where it runs", "choices": DEVICES})
    seed: int = field(default=0, metadata={"help": "seed of requests that name none"})

    def __post_init__(self) -> None:
        for name, allowed in (
            ("dtype", DTYPES), ("load_format", LOAD_FORMATS), ("device", DEVICES)
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.max_model_len is not None and self.max_model_len < 1:
            raise ValueError(f"max_model_len must be positive, got {self.max_model_len}")


@dataclass(frozen=True, slots=True)
class GraphConfig:
    """CUDA graphs of decode and small mixed steps, captured at start within these bounds."""

    enforce_eager: bool = field(
        default=False, metadata={"help": "capture no CUDA graphs (slower; starts sooner)"}
    )
    graph_bytes: int = field(
        default=2 << 30, metadata={"help": "GPU memory that the graphs may take"}
    )
    graph_seconds: float = field(default=30.0, metadata={"help": "time that capturing may take"})

    def __post_init__(self) -> None:
        if self.graph_bytes < 0 or self.graph_seconds < 0:
            raise ValueError("graph_bytes and graph_seconds must not be negative")


@dataclass(frozen=True, slots=True)
class ProfileConfig:
    """Records of what each step costs; off unless a directory is named."""

    profile_dir: str = field(
        default="", metadata={"help": "write a line for each step here, and timelines if asked for"}
    )
    profile_steps: int = field(
        default=0, metadata={"help": "steps of a timeline (of torch.profiler); 0: none"}
    )
    profile_every: int = field(
        default=500, metadata={"help": "steps from one timeline to the next"}
    )

    def __post_init__(self) -> None:
        if self.profile_steps < 0 or self.profile_every < 1:
            raise ValueError("profile_steps must not be negative, profile_every must be positive")
        if self.profile_steps and not self.profile_dir:
            raise ValueError("profile_steps needs profile_dir, where timelines are written")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """Which adapters are known at start and from where more may come."""

    adapters: tuple[tuple[str, str], ...] = field(
        default=(), metadata={"help": "NAME=PATH of a PEFT adapter directory; may be repeated",
                              "flag": "--adapter"}
    )  # fmt: skip
    adapter_dir: str = field(
        default="", metadata={"help": "every PEFT directory in this folder, under its own name"}
    )
    adapter_root: str = field(
        default="",
        metadata={"help": "the only folder that clients may load adapters from; empty: none"},
    )


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The ZeroMQ endpoint that clients talk to."""

    endpoint: str = field(
        default="tcp://127.0.0.1:5599", metadata={"help": "where clients connect (tcp or ipc)"}
    )
    server_secret_key_file: str = field(
        default="", metadata={"help": "CurveZMQ secret key; required on a public address"}
    )
    client_public_keys_dir: str = field(
        default="",
        metadata={"help": "folder of the clients' CurveZMQ public keys; empty: any client key"},
    )
    insecure: bool = field(
        default=False, metadata={"help": "allow a public address without CurveZMQ"}
    )
    max_message_bytes: int = field(
        default=16 << 20, metadata={"help": "largest message accepted from a client"}
    )
    max_client_backlog: int = field(
        default=8192, metadata={"help": "unread messages of one client before it is dropped"}
    )
    max_requests_per_client: int = field(
        default=4096, metadata={"help": "unfinished requests of one client"}
    )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything that the processes of one engine need; it reaches each of them on a pipe."""

    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    graph: GraphConfig = field(default_factory=GraphConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    num_workers: int = field(
        default=1, metadata={"help": "GPU workers (tensor parallel ranks); 1 for now"}
    )

    def __post_init__(self) -> None:
        if self.num_workers != 1:
            raise ValueError(f"num_workers must be 1 in this version, got {self.num_workers}")
