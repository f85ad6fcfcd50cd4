"""The files of examples/operations fit the commands and the times that they name."""

import argparse
import configparser
import shlex
from pathlib import Path
from typing import Any

import yaml

from loraplex.engine.config import EngineConfig
from loraplex.engine.processes.engine import STOP_TIMEOUT_S
from loraplex.entrypoints.cli import flags
from loraplex.entrypoints.cli import main as cli

FOLDER = Path(__file__).parents[4] / "examples" / "operations"
CONFIG = FOLDER / "server.yaml"


def config_of(arguments: list[str]) -> tuple[argparse.Namespace, EngineConfig]:
    """Parses a command line that names the file by its place on a server."""
    here = [word.replace("/etc/loraplex/server.yaml", str(CONFIG)) for word in arguments]
    args = cli.make_parser().parse_args(here)
    return args, flags.engine_config_of(args)


def stop_s(config: EngineConfig) -> float:
    return config.server.drain_grace + config.server.drain_timeout + STOP_TIMEOUT_S


def test_the_configuration_is_read() -> None:
    args, config = config_of(["serve", "--config", str(CONFIG)])
    assert config.server.served_model_name == "llama"
    assert config.memory.adapter_host_bytes == 32 << 30
    assert (args.log_format, args.log_level) == ("json", "info")


def test_the_unit_of_systemd() -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=True)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(FOLDER / "loraplex.service")
    service = unit["Service"]
    _, *arguments = shlex.split(service["ExecStart"])
    _, config = config_of(arguments)
    assert service["Type"] == "notify"
    assert int(service["TimeoutStopSec"]) > stop_s(config)


def test_the_deployment() -> None:
    deployment: dict[str, Any] = yaml.safe_load((FOLDER / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    _, config = config_of([*container["command"][1:], *container["args"]])
    assert config.server.insecure and config.server.http == "0.0.0.0:8000"
    assert pod["terminationGracePeriodSeconds"] > stop_s(config)
    ready = container["readinessProbe"]
    assert ready["periodSeconds"] * ready["failureThreshold"] < config.server.drain_grace
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == 8000
