"""`loraplex serve` with a small model: SIGHUP adds and revokes keys without a restart."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from helpers.models.hf_models import make_hf_model, make_tokenizer
from helpers.running.key_files import key_of, write_keys
from helpers.running.processes import wait_until

pytestmark = pytest.mark.e2e
COMMAND = [sys.executable, "-P", "-m", "loraplex.entrypoints.cli.main", "serve"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_tokenizer(tmp_path / "base")
    make_hf_model("llama", tmp_path / "base", seed=5)
    write_keys(tmp_path / "keys.yaml", ann={})
    return tmp_path


@pytest.fixture
def server(root: Path) -> Iterator["subprocess.Popen[str]"]:
    command = [
        *COMMAND, str(root / "base"), "--device", "cpu", "--max-model-len", "256",
        "--num-pages", "200", "--endpoint", f"ipc://{root}/s", "--http", "127.0.0.1:0",
        "--api-keys", str(root / "keys.yaml"), "--log-level", "info",
    ]  # fmt: skip
    with open(root / "log", "w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    yield process
    process.kill()
    process.communicate()


def url_of(server: "subprocess.Popen[str]") -> str:
    assert server.stdout is not None
    lines = iter(server.stdout.readline, "Ctrl-C stops it.\n")
    line, _console = [line for line in lines if "http://" in line]
    return line.split()[-1]


def test_keys_come_and_go_with_sighup(root: Path, server: "subprocess.Popen[str]") -> None:
    url, log = url_of(server), root / "log"

    def works(name: str) -> bool:
        client = openai.OpenAI(base_url=url, api_key=key_of(name), max_retries=0)
        try:
            answer = client.completions.create(model=str(root / "base"), prompt="Hi", max_tokens=2)
        except openai.AuthenticationError:
            return False
        return bool(answer.choices)

    assert [works("ann"), works("ben")] == [True, False]
    write_keys(root / "keys.yaml", ben={})
    assert works("ann")  # nothing changes before the signal
    os.kill(server.pid, signal.SIGHUP)
    wait_until(lambda: works("ben"))
    assert not works("ann")
    (root / "keys.yaml").write_text("tenants: {ann: {key: x}}")
    os.kill(server.pid, signal.SIGHUP)
    wait_until(lambda: "unknown field `key`" in log.read_text())
    assert "the former keys and tenants stay" in log.read_text()
    assert [works("ann"), works("ben")] == [False, True]
    write_keys(root / "keys.yaml", ann={"limits": {"requests_per_minute": 1}}, ben={})
    os.kill(server.pid, signal.SIGHUP)
    wait_until(lambda: works("ann"))
    with pytest.raises(openai.RateLimitError) as refusal:
        works("ann")
    assert 1 <= int(refusal.value.response.headers["retry-after"]) <= 60
    assert key_of("ann") not in log.read_text() and key_of("ben") not in log.read_text()
    assert works("ben")
    server.send_signal(signal.SIGTERM)
    assert server.wait(120) == 0
