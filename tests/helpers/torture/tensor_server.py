"""Scripts for processes that a test kills: a server of a real engine, and a client of it.

Arguments: "serve", the folder of helpers.running.http_server.make_models, and an endpoint; or
"load", an endpoint, a name, and the folder of an adapter, whose tensors are sent.
"""

import json
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

from loraplex import Client
from loraplex.engine.config import EngineConfig, ModelConfig, ServerConfig
from loraplex.engine.processes.engine import Engine
from loraplex.memory.config import MemoryConfig


def serve(root: str, endpoint: str) -> None:
    engine = Engine(
        EngineConfig(
            model=ModelConfig(model=f"{root}/base", device="cpu", max_model_len=512),
            memory=MemoryConfig(num_pages=600),
            server=ServerConfig(endpoint=endpoint),
        )
    )

    def announce(started: Engine) -> None:
        print(json.dumps({"endpoint": started.endpoint, "pids": started.pids}), flush=True)

    sys.exit(engine.serve(on_ready=announce))


def load(endpoint: str, name: str, folder: str) -> None:
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    client = Client(endpoint)
    client.load_adapter_tensors(name, config, load_file(Path(folder) / "adapter_model.safetensors"))
    print("{}", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    {"serve": serve, "load": load}[sys.argv[1]](*sys.argv[2:])
