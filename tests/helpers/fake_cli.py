"""The command `loraplex`, its engines with a worker that has no model; run as a script."""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from loraplex.engine.supervisor import Engine
from loraplex.entrypoints import cli, cli_serve

from helpers.fake_llm import WORKER

cli_serve.Engine = functools.partial(  # type: ignore
    Engine, worker_command=[sys.executable, str(WORKER), "--delay", "0.02"]
)
sys.exit(cli.main())
