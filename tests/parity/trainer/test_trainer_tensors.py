"""Adapters from a trainer's memory against PEFT, and against the same adapters from files."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex import LLM, LoRARequest, SamplingParams
from loraplex.engine.errors import AdapterError
from loraplex.entrypoints.client.tensors.sent_tensors import SentTensors

from helpers.models.engine_runs import answer, check
from helpers.models.hf_models import make_hf_model
from helpers.models.peft_adapters import make_adapter
from helpers.models.peft_oracle import Case, PeftOracle, make_cases

QKV = ["q_proj", "k_proj", "v_proj"]
NAMES = ["first", "second", "dora"]
Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> PeftOracle:
    root = tmp_path_factory.mktemp("trainer")
    model = make_hf_model("llama", root / "base", seed=3)
    for seed, name in enumerate(NAMES):
        targets = "all-linear" if name == "dora" else QKV
        make_adapter(
            model, root / "adapters" / name, seed=seed, r=8, alpha=16, targets=targets,
            use_dora=name == "dora",
        )  # fmt: skip
    return PeftOracle(root / "base", root / "adapters", model=model, names=NAMES)


def make_llm(oracle: PeftOracle, **options) -> LLM:
    values = {
        "device": "cpu", "dtype": "float32", "in_process": True, "skip_tokenizer_init": True,
        "num_pages": 512, "max_num_seqs": 16,
    }  # fmt: skip
    return LLM(str(oracle.base), **(values | options))


@pytest.fixture(scope="module")
def llm(oracle: PeftOracle) -> Iterator[LLM]:
    with make_llm(oracle) as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_stays(llm: LLM) -> Iterator[None]:
    yield
    for adapter in llm.client.list_adapters():
        llm.client.unload_adapter(adapter["name"])
    assert llm.client.stats()["adapter_tensor_bytes"] == 0


def saved(oracle: PeftOracle, name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Returns the configuration and the tensors that PEFT has saved."""
    folder = oracle.adapters / name
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def one(llm: LLM, adapter: LoRARequest | str, prompt: list[int]):
    request = LoRARequest(adapter) if isinstance(adapter, str) else adapter
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    prompts = {"prompt_token_ids": prompt}
    (output,) = llm.generate(prompts, params, lora_request=request, use_tqdm=False)
    return output


def test_a_peft_model_is_served_as_peft_computes_it(llm: LLM, oracle: PeftOracle) -> None:
    for name in NAMES:
        row = llm.load_adapter(name, oracle.model, peft_name=name)
        kind = "dora" if name == "dora" else "lora"
        assert (row["state"], row["kind"], row["path"]) == ("ready", kind, "")
    cases = make_cases(oracle, (5, 40), adapters=("", *NAMES))
    check(oracle, cases, answer(llm, cases))


def test_workers_in_processes_read_the_tensors(oracle: PeftOracle) -> None:
    with make_llm(oracle, in_process=False, tensor_parallel_size=2) as llm:
        for name in NAMES:
            llm.load_adapter(name, oracle.model, peft_name=name)
        cases = make_cases(oracle, (5, 40), adapters=("", *NAMES))
        check(oracle, cases, answer(llm, cases))


def test_equal_tensors_are_one_version_wherever_they_come_from(
    llm: LLM, oracle: PeftOracle
) -> None:
    from_file = llm.client.load_adapter("file", str(oracle.adapters / "first"))
    from_model = llm.load_adapter("model", oracle.model, peft_name="first")
    from_parts = llm.load_adapter("parts", *saved(oracle, "first"))
    hashes = {row["content_hash"] for row in (from_file, from_model, from_parts)}
    assert len(hashes) == 1
    prompt = list(range(3, 43))
    assert one(llm, "file", prompt).num_cached_tokens == 0
    assert one(llm, "parts", prompt).num_cached_tokens == 32  # the prefix cache knows the content


def test_new_tensors_under_a_name_are_used_from_the_answer_on(llm: LLM, oracle: PeftOracle) -> None:
    llm.load_adapter("run", oracle.model, peft_name="first")
    size = llm.client.stats()["adapter_tensor_bytes"]
    prompt = list(range(5, 45))
    one(llm, "run", prompt)
    for name, num_cached in (("second", 0), ("dora", 0), ("first", 32)):
        llm.load_adapter("run", oracle.model, peft_name=name)
        output = one(llm, "run", prompt)
        got = list(output.outputs[0].token_ids)
        case = Case(name, tuple(prompt))
        assert got == oracle.choices(case, got)
        assert output.num_cached_tokens == num_cached  # blocks of equal content alone
    assert llm.client.stats()["adapter_tensor_bytes"] == size  # earlier versions are freed


def test_running_requests_keep_the_tensors_they_began_with(llm: LLM, oracle: PeftOracle) -> None:
    llm.load_adapter("run", oracle.model, peft_name="first")
    size = llm.client.stats()["adapter_tensor_bytes"]
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, detokenize=False)
    old = [
        llm.client.submit({"prompt_token_ids": [7 + i, 8, 9]}, params, adapter="run", stream=True)
        for i in range(4)
    ]
    while not llm.client.poll():
        pass  # the first tokens have come
    llm.load_adapter("run", oracle.model, peft_name="second")
    assert llm.client.stats()["adapter_tensor_bytes"] == 2 * size
    new = llm.client.submit({"prompt_token_ids": [7, 8, 9]}, params, adapter="run")
    answers: dict[str, list[int]] = {}
    while llm.client.num_outstanding:
        for output in llm.client.poll():
            if output.finished:
                answers[output.request_id] = list(output.outputs[0].token_ids)
    for number, request_id in enumerate([*old, new]):
        name = "second" if request_id == new else "first"
        first = 7 if request_id == new else 7 + number
        case = Case(name, (first, 8, 9))
        assert answers[request_id] == oracle.choices(case, answers[request_id])
    assert llm.client.stats()["adapter_tensor_bytes"] == size


def test_an_evicted_adapter_is_read_again(oracle: PeftOracle) -> None:
    config, tensors = saved(oracle, "first")
    size = SentTensors(tensors).num_bytes + len(json.dumps(config))
    options = {"max_adapter_slots": 1, "adapter_host_bytes": 4 * size}
    with make_llm(oracle, **options) as llm:
        for number in range(4):  # the host store rounds them up to pages, and holds fewer
            scaled = {name: tensor * (1 + number) for name, tensor in tensors.items()}
            llm.load_adapter(f"run-{number}", config, scaled)
        first = one(llm, "run-0", [5, 6, 7])
        for number in (1, 2, 3):
            one(llm, f"run-{number}", [5, 6, 7])
        tiers = {row["name"]: row["tier"] for row in llm.client.list_adapters()}
        again = one(llm, "run-0", [5, 6, 7])
    assert "memory" in tiers.values()
    assert again.outputs[0].token_ids == first.outputs[0].token_ids


def test_a_size_limit(oracle: PeftOracle) -> None:
    config, tensors = saved(oracle, "first")
    size = sum(tensor.nbytes for tensor in tensors.values())
    with make_llm(oracle, adapter_host_bytes=2 * size) as llm:
        llm.load_adapter("one", config, tensors)
        with pytest.raises(AdapterError, match="unload some, or raise adapter_host_bytes"):
            llm.load_adapter("two", config, tensors)
        llm.client.unload_adapter("one")
        llm.load_adapter("two", config, tensors)


@pytest.mark.parametrize("wrong", ["config", "name", "shape", "nan", "missing"])
def test_wrong_tensors_are_refused_as_files_are(
    llm: LLM, oracle: PeftOracle, tmp_path: Path, wrong: str
) -> None:
    config, tensors = saved(oracle, "first")
    match wrong:
        case "config":
            config["modules_to_save"] = ["lm_head"]
        case "name":
            tensors["base_model.model.encoder.lora_A.weight"] = torch.zeros(8, 64)
        case "shape":
            tensors[Q0] = torch.zeros(8, 63)
        case "nan":
            tensors[Q0] = torch.full((8, 64), torch.nan)
        case "missing":
            del tensors[Q0]
    folder = tmp_path / "x"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError) as of_files:
        llm.client.load_adapter("x", str(folder))
    with pytest.raises(AdapterError) as of_tensors:
        llm.load_adapter("x", config, tensors)
    assert str(of_tensors.value) == str(of_files.value).replace(f" at {folder}", "")


def test_requests_of_vllm_with_tensors(llm: LLM, oracle: PeftOracle) -> None:
    config, tensors = saved(oracle, "first")
    request = LoRARequest("v", 7, peft_config=config, lora_tensors=tensors)
    assert llm.llm_engine.add_lora(request)
    assert not llm.llm_engine.add_lora(request)
    assert request == LoRARequest("v", 7) and hash(request) == hash(LoRARequest("v", 7))
    got = list(one(llm, request, [3, 4, 5]).outputs[0].token_ids)
    case = Case("first", (3, 4, 5))
    assert got == oracle.choices(case, got)
    with pytest.raises(ValueError, match="give peft_config and lora_tensors, or neither"):
        LoRARequest("v", 7, lora_tensors=tensors)
