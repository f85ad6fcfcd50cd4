"""The console and loraplex top of a server with API keys."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraplex.engine.config import ServerConfig

from helpers.browser.browser_waits import wait_until
from helpers.fakes.fake_engine import fake_config
from helpers.running.processes import running_engine

pytestmark = pytest.mark.e2e
ANN, ADMIN = "anns-key-of-20-characters-or-more", "admins-key-of-20-characters-or-more"
TOP = [sys.executable, "-P", "-m", "loraplex.entrypoints.cli.main", "top", "--json"]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    keys = tmp_path_factory.mktemp("keys") / "keys.yaml"
    tenants = {"ann": {"keys": [{"key": ANN}]}, "admin": {"keys": [{"key": ADMIN}]}}
    keys.write_text(json.dumps({"tenants": tenants}))
    keys.chmod(0o600)
    server = ServerConfig(endpoint="", http="127.0.0.1:0", api_keys=str(keys))
    with running_engine(fake_config(server=server)) as engine:
        yield f"http://{engine.http_endpoint}"


def give_key(page: Any, key: str) -> None:
    page.fill("#key-input", key)
    page.press("#key-input", "Enter")


def test_the_page_asks_and_the_live_view_is_the_operators(url: str, page: Any) -> None:
    page.goto(f"{url}/#live")
    page.wait_for_selector("#key-dialog[open]")
    give_key(page, ANN)
    wait_until(page, "document.getElementById('live-state').textContent.includes('operator')")
    page.wait_for_selector("#key-dialog[open]")
    give_key(page, ADMIN)
    wait_until(page, "document.getElementById('live-state').textContent.startsWith('Live')")
    assert page.inner_text("#pages-free") == "399"


@pytest.mark.parametrize("key", ["", ANN, ADMIN])
def test_top_needs_the_operators_key(url: str, key: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{key}\n")
    options = ["--api-key-file", str(tmp_path / "key")] if key else []
    with subprocess.Popen(
        [*TOP, "--endpoint", url, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        process.terminate()
        error = process.stderr.read()
    if key == ADMIN:
        assert json.loads(line)["pages"]["num_pages"] == 399
    else:
        assert line == "" and "key" in error and process.returncode == 1
