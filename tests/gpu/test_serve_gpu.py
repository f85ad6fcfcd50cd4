"""A Llama-3-8B of random weights with 8 adapters, behind `loraplex serve` and its socket."""

import signal
import subprocess
import sys

import pytest
import torch

from loraplex import Client, SamplingParams

from helpers.models.dummy_models import LLAMA_3_8B, write_adapter, write_config

pytestmark = [pytest.mark.gpu, pytest.mark.e2e]

NUM_REQUESTS, NUM_PROMPT_TOKENS, NUM_NEW_TOKENS = 64, 128, 128


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("serve")
    model = write_config(root / "model", LLAMA_3_8B)
    command = [
        sys.executable, "-m", "loraplex.entrypoints.cli.main", "serve", "--model", str(model),
        "--load-format", "dummy", "--skip-tokenizer-init", "--endpoint", f"ipc://{root}/api",
        "--pool-bytes", str(20 << 30),
    ]  # fmt: skip
    for i in range(8):
        path = write_adapter(root / f"a{i}", LLAMA_3_8B, rank=16, seed=i)
        command += ["--adapter", f"a{i}={path}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if f"ipc://{root}/api" in line:
                break
        assert process.poll() is None, "".join(lines)
        yield f"ipc://{root}/api"
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0


def test_serve_llama_3_8b(server):
    generator = torch.Generator().manual_seed(0)
    params = SamplingParams(
        temperature=0.0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True, detokenize=False
    )
    with Client(server, timeout_s=120) as client:
        for _ in range(2):  # the second with resident adapters
            prompts = torch.randint(
                0, 128000, (NUM_REQUESTS, NUM_PROMPT_TOKENS), generator=generator
            )
            for i, prompt in enumerate(prompts.tolist()):
                adapter = f"a{i % 8}" if i % 9 else None
                client.submit({"prompt_token_ids": prompt}, params, adapter=adapter)
            finished = []
            while client.num_outstanding:
                finished += [output for output in client.poll(60) if output.finished]
            assert len(finished) == NUM_REQUESTS
            num_tokens = sum(len(output.outputs[0].token_ids) for output in finished)
            assert num_tokens == NUM_REQUESTS * NUM_NEW_TOKENS
        stats = client.stats()
    assert stats["running"] == stats["waiting"] == 0 and len(stats["resident_adapters"]) == 8
