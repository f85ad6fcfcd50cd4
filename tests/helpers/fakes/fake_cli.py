"""The command `loraplex`, its engines with a worker that has no model; run as a script."""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from loraplex.engine.processes.engine import Engine
from loraplex.entrypoints.cli import main as cli
from loraplex.entrypoints.cli import serve as cli_serve

from helpers.fakes.fake_llm import WORKER

cli_serve.Engine = functools.partial(  # type: ignore
    Engine, worker_command=[sys.executable, str(WORKER), "--delay", "0.02"]
)
sys.exit(cli.main())
