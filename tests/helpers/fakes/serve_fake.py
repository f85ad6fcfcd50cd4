"""A server's script for tests: serves a fake engine and prints what a test must know, as JSON.

Arguments: the mode, then the fake worker's options. Modes: "serve" is what `loraplex serve` does
with --drain-timeout 0; "thread" starts an engine in a thread without a main guard and ends without
stopping it.
"""

import json
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from loraplex.engine.config import ServerConfig
from loraplex.engine.processes.engine import Engine

from helpers.fakes.fake_engine import fake_config
from helpers.running.processes import leftovers, make_engine, run_dirs

mode, *worker_options = sys.argv[1:]
config = fake_config(server=ServerConfig(endpoint="", drain_timeout=0.0))
engine = make_engine(config, *worker_options)
before = run_dirs()


def announce(started: Engine) -> None:
    known = leftovers(started, before) | {"endpoint": started.endpoint, "names": started.pids}
    print(json.dumps(known), flush=True)


if mode == "serve":
    status = engine.serve(on_ready=announce)
    print(engine.dead_reason or "", file=sys.stderr)
    sys.exit(status)

thread = threading.Thread(target=engine.start)
thread.start()
thread.join()
announce(engine)
