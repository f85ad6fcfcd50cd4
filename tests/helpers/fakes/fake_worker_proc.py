"""A worker process without a model; the supervisor starts it where a test asks for it.

Options before the descriptor that the supervisor appends: --delay SECONDS, --crash-after STEPS,
--fail TEXT (a ConfigError while loading), --hang (never ready), --sleep-after STEPS (the next step
never ends), --layers N (each step's delay has N parts, and each part is marked as done),
--keep-loads (no load is answered).
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from loraplex.engine.errors import ConfigError
from loraplex.engine.ipc.child import Child, run_child
from loraplex.engine.processes.worker_main import serve

from helpers.fakes.fake_engine import FakeEngineWorker

parser = argparse.ArgumentParser()
parser.add_argument("--delay", type=float, default=0.0)
parser.add_argument("--crash-after", type=int, default=0)
parser.add_argument("--sleep-after", type=int, default=0)
parser.add_argument("--layers", type=int, default=1)
parser.add_argument("--keep-loads", action="store_true")
parser.add_argument("--fail", default="")
parser.add_argument("--hang", action="store_true")
options, rest = parser.parse_known_args()
sys.argv[1:] = rest


def run(child: Child) -> None:
    if options.fail:
        raise ConfigError(options.fail)
    while options.hang:
        time.sleep(1)
    worker = FakeEngineWorker(
        child.start.config,
        child.start.index,
        wakeup=child.wakeup.set,
        delay_s=options.delay,
        crash_after=options.crash_after,
        sleep_after=options.sleep_after,
        num_layers=options.layers,
        keeps_loads=options.keep_loads,
        on_layer=child.activity.mark,
        folder_server=child.start.folder_server,
    )
    serve(child, worker)


run_child(run)
