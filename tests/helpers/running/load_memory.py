"""Loads one rank's part of a checkpoint in a process of its own and prints the memory it took.

``python -m helpers.running.load_memory PATH RANK WORLD_SIZE`` prints a JSON object in bytes:
`shard`, the weights that the rank holds; `anonymous`, the most memory above that at the start which
is no page of a file; `mapped`, the most pages of files.
"""

import json
import re
import sys
import threading
from pathlib import Path

import torch

from loraplex.engine.checkpoint.spec_loading import load_spec
from loraplex.engine.checkpoint.weights import load_weights
from loraplex.engine.model.decoder import Decoder
from loraplex.engine.model.shard import shard_of

KINDS = {"anonymous": "RssAnon", "mapped": "RssFile"}
INTERVAL_S = 0.0005


def resident() -> dict[str, int]:
    """Returns this process's resident bytes of each kind."""
    status = Path("/proc/self/status").read_text()
    found = dict(re.findall(r"^(Rss\w+):\s+(\d+) kB", status, re.MULTILINE))
    return {name: 1024 * int(found[kind]) for name, kind in KINDS.items()}


def load(path: Path, rank: int, world_size: int) -> dict[str, int]:
    spec = load_spec(path)
    if path.suffix == ".gguf":
        import loraplex.engine.checkpoint.weights_gguf  # noqa: F401  loads its libraries
    start, done = resident(), threading.Event()
    peak = dict(start)

    def watch() -> None:
        while not done.wait(INTERVAL_S):
            peak.update({name: max(peak[name], size) for name, size in resident().items()})

    watcher = threading.Thread(target=watch)
    watcher.start()
    shard = shard_of(spec, worker_rank=rank, world_size=world_size)
    model = Decoder(spec, dtype=spec.dtype, device="cpu", shard=shard)
    load_weights(model, path, progress=False)
    done.set()
    watcher.join()
    grown = {name: peak[name] - start[name] for name in KINDS}
    return {"shard": sum(tensor.nbytes for tensor in model.parameters().values()), **grown}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(load(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
