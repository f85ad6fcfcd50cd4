"""Stores at every entrance besides `serve`: LLM, `loraplex generate`, and a cluster."""

import json
import shutil
from pathlib import Path

import pytest

from loraplex import LLM, Client, LoRARequest, SamplingParams
from loraplex.engine.cluster.engine_cluster import EngineCluster
from loraplex.engine.cluster.launch.launchers import NO_RAY
from loraplex.engine.config import ServerConfig
from loraplex.engine.errors import UnknownAdapterError
from loraplex.engine.store_config import StoreConfig
from loraplex.entrypoints.cli import main

from helpers.fakes.fake_engine import expected_tokens, fake_config, make_fake_adapter
from helpers.models.hf_models import make_hf_model, make_tokenizer
from helpers.models.peft_adapters import make_adapter
from helpers.running.processes import GUARD_S, fake_worker_command

pytestmark = pytest.mark.e2e
GREEDY = SamplingParams(max_tokens=6, temperature=0.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, and in the folder "store" an adapter "org/legal"."""
    root = tmp_path_factory.mktemp("models")
    make_tokenizer(root / "base")
    model = make_hf_model("llama", root / "base", seed=5)
    make_adapter(model, root / "store" / "org" / "legal", r=4, alpha=8, targets=["q_proj"])
    return root


def test_llm_and_generate(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, base = str(models / "store"), str(models / "base")
    small = {"device": "cpu", "num_pages": 100, "max_model_len": 128}
    with LLM(base, adapter_stores=[store], **small) as llm:
        path = str(shutil.copytree(models / "store" / "org" / "legal", models / "copy"))
        outputs = llm.generate(
            ["Once upon"] * 3,
            GREEDY,
            lora_request=[LoRARequest("org/legal"), LoRARequest("copy", 1, path), None],
        )
        found, by_path, of_base = (output.outputs[0].text for output in outputs)
        assert found == by_path != of_base
    flags = ["--device", "cpu", "--num-pages", "100", "--max-model-len", "128", "--no-chat"]
    status = main.main(
        ["generate", "--model", base, *flags, "--adapter-store", store, "--use", "org/legal",
         "--max-tokens", "6", "--temperature", "0", "--json", "Once upon"]
    )  # fmt: skip
    assert status == 0
    assert json.loads(capsys.readouterr().out)["text"] == found


def test_a_cluster(tmp_path: Path) -> None:
    make_fake_adapter(tmp_path / "store" / "legal", "stored")
    config = fake_config(
        server=ServerConfig(endpoint="tcp://127.0.0.1:0"),
        store=StoreConfig(adapter_stores=(str(tmp_path / "store"),)),
    )
    command = fake_worker_command("--delay", "0.02")
    cluster = EngineCluster(config, worker_command=command, num_engines=2, ray_address=NO_RAY)
    cluster.start(timeout_s=GUARD_S)
    with cluster, Client(cluster.endpoint) as client:
        prompts = [{"prompt_token_ids": [number]} for number in range(8)]
        asked = [client.submit(prompt, GREEDY, adapter="legal") for prompt in prompts]
        results = {}
        while client.num_outstanding:
            results.update({result.request_id: result for result in client.poll(10.0)})
        for number, request_id in enumerate(asked):
            tokens = expected_tokens([number], "stored", max_tokens=6)
            assert list(results[request_id].outputs[0].token_ids) == tokens
        with pytest.raises(UnknownAdapterError, match="no store has it"):
            list(client.generate({"prompt_token_ids": [1]}, GREEDY, adapter="nobody"))
