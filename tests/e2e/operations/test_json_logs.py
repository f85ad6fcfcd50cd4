"""With --log-format json each line is an object, and each request one line with its id."""

import json
import subprocess
from typing import Any

import httpx
import pytest

from loraplex import Client, SamplingParams

from helpers.running.processes import GUARD_S
from helpers.serving.served_command import COMMAND, FAKE, ServedCommand, serving

pytestmark = pytest.mark.e2e
OPTIONS = ("--log-format", "json", "--log-level", "info", "--drain-timeout", "60")
BODY = {"prompt": [5, 6], "max_tokens": 3, "ignore_eos": True}


def post(server: ServedCommand, body: dict[str, Any], **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(f"{server.http}/v1/completions", json=body, headers=named, timeout=60)


def test_every_line_is_json_and_names_the_request() -> None:
    with serving(*FAKE, *OPTIONS) as server:
        by_header = post(server, {**BODY, "request_id": "body-1"}, X_Request_Id="head-1")
        by_body = post(server, {**BODY, "request_id": "body-2", "prompt": [[5], [6]]})
        streamed = post(server, {**BODY, "stream": True, "return_token_ids": True})
        refused = post(server, {**BODY, "model": "nobody"}, X_Request_Id="head-2")
        unfit = post(server, {**BODY, "request_id": "two words"})
        with Client(server.endpoint) as client:
            params = SamplingParams(max_tokens=2)
            list(client.generate([5, 6], params, request_id="zmq\n1", salt="x"))
        server.signal()
        status, err = server.wait()
    assert status == 0
    assert by_header.headers["x-request-id"] == "head-1"
    assert by_header.json()["id"] == "cmpl-head-1"
    assert by_body.headers["x-request-id"] == "body-2"
    made = streamed.headers["x-request-id"]
    assert f'"id":"cmpl-{made}"' in streamed.text
    assert refused.status_code == 404 and refused.headers["x-request-id"] == "head-2"
    assert unfit.status_code == 400 and unfit.json()["error"]["param"] == "request_id"

    said = [json.loads(line) for line in server.lines]
    assert said[0]["event"] == "ready"
    assert said[0]["http"] == server.http.removeprefix("http://")
    logged = [json.loads(line) for line in err.splitlines()]
    assert {line["process"] for line in logged} >= {"supervisor", "http 0", "frontend 0"}
    ends = {line["request_id"]: line for line in logged if line.get("event") == "request"}
    assert set(ends) == {"head-1", "body-2-0", "body-2-1", made, "head-2", "zmq\n1"}
    assert ends["head-2"]["reason"] == "unknown_adapter"
    line = ends["zmq\n1"]
    assert (line["process"], line["level"], line["logger"]) == (
        "frontend 0", "info", "loraplex.requests",
    )  # fmt: skip
    assert (line["prompt_tokens"], line["output_tokens"], line["reason"]) == (2, 2, "length")
    assert line["adapter"] == "" and line["tenant"] == ""
    assert 0 <= line["queued_s"] <= line["first_token_s"] <= line["last_token_s"] <= line["total_s"]


def test_a_failure_is_json_too() -> None:
    run = subprocess.run(
        [*COMMAND, "serve", "--log-format", "json", "--model", "/nowhere"],
        capture_output=True, text=True, timeout=GUARD_S,
    )  # fmt: skip
    assert run.returncode == 2
    (line,) = [json.loads(line) for line in run.stderr.splitlines()]
    assert (line["event"], line["level"]) == ("failed", "error")
    assert "/nowhere does not exist" in line["message"]
