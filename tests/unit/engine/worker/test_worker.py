"""The worker's commands: adapters in, out and refused; sizes and errors at the start."""

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from loraplex.engine.adapters import reader
from loraplex.engine.config import EngineConfig, ModelConfig
from loraplex.engine.errors import ConfigError
from loraplex.engine.worker.setup import resolve_dtype
from loraplex.engine.worker.worker import Worker
from loraplex.memory.config import MemoryConfig
from loraplex.scheduler.config import SchedulerConfig
from loraplex.scheduler.worker_protocol import (
    AdapterEvicted,
    AdapterInspected,
    AdapterLoaded,
    DropAdapter,
    InspectAdapter,
    LoadAdapter,
    StepPlan,
    UnloadAdapter,
    int_array,
)

from helpers.models.hf_models import make_hf_model
from helpers.models.peft_adapters import make_adapter
from helpers.running.step_driver import Sequence, StepDriver

TARGETS = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("worker")
    model = make_hf_model("llama", path / "base", seed=1)
    for seed, name in enumerate(("one", "two")):
        make_adapter(model, path / name, r=4, alpha=8, targets=TARGETS, seed=seed)
    return path


def make_config(root: Path, **memory: Any) -> EngineConfig:
    options = {"block_tokens": 16, "num_pages": 64, "max_lora_rank": 16, "max_adapter_slots": 8}
    return EngineConfig(
        model=ModelConfig(model=str(root / "base"), device="cpu"),
        memory=MemoryConfig(**{**options, **memory}),
        scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=256),
    )


def ask(worker: Worker, command: Any) -> Any:
    """Evictions that the command led to are passed over."""
    worker.handle(command)
    while True:
        events = [e for e in worker.events(120.0) if not isinstance(e, AdapterEvicted)]
        if events:
            assert len(events) == 1
            return events[0]


def inspect(worker: Worker, path: Path) -> AdapterInspected:
    return ask(worker, InspectAdapter(name="name", path=str(path)))


def test_ready(root: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(root / "base")
    weights = load_file(root / "base" / "model.safetensors")
    lines: list[str] = []
    worker = Worker(make_config(root), progress=lines.append)
    ready = worker.ready
    assert (ready.num_pages, ready.num_layers, ready.vocab_size) == (64, 3, 512)
    assert ready.page_bytes == 16 * 2 * 2 * 16 * 4
    assert ready.max_model_len == 63 * 16
    assert (ready.device, ready.lora_backend, ready.attention_backend) == ("cpu", "torch", "torch")
    assert ready.linear_backend == "torch"
    assert ready.base_fingerprint.endswith(":torch.float32:plain:torch.float32")
    assert len(ready.base_fingerprint) > 40
    assert list(ready.eos_token_ids) == [2]
    assert ready.weight_bytes == sum(tensor.nbytes for tensor in weights.values())
    make_adapter(model, tmp_path / "all", r=16, alpha=8, targets="all-linear")
    typical = inspect(worker, tmp_path / "all")
    assert ready.adapter_rank == typical.max_rank
    assert ready.adapter_bytes == typical.num_pages * ready.page_bytes * ready.num_layers
    assert "loading base as float32 on cpu" in lines[0] and "64 pages" in lines[1]
    worker.close()


def test_prefixes_of_other_types_are_told_apart(root: Path) -> None:
    """K and V that were computed or kept with other roundings are other numbers."""
    config, prints = make_config(root), set()
    rounded = replace(config, model=replace(config.model, quantization="fp8"))
    for one in (config, rounded, make_config(root, kv_cache_dtype="fp8")):
        worker = Worker(one)
        prints.add(worker.ready.base_fingerprint)
        worker.close()
    assert len(prints) == 3


def test_inspect(root: Path) -> None:
    woken = threading.Event()
    worker = Worker(make_config(root), wakeup=woken.set)
    worker.handle(InspectAdapter(name="one", path=str(root / "one")))
    assert woken.wait(120)
    (event,) = worker.events()
    assert isinstance(event, AdapterInspected) and not event.error
    assert (event.name, event.path) == ("one", str(root / "one"))
    assert (event.max_rank, event.modules) == (4, TARGETS)
    # rank 4 on q (64 -> 64) and v (64 -> 32, in rows of 64): 1,024 elements a layer, one page
    assert (event.num_pages, event.num_bytes) == (1, 3 * 1024 * 4)
    assert worker.events() == []
    again = inspect(worker, root / "one")
    assert again.content_hash == event.content_hash
    assert inspect(worker, root / "two").content_hash != event.content_hash


def test_bad_adapters_are_answers(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(make_config(root, max_lora_rank=2))
    assert "rank 4, above max_lora_rank 2" in inspect(worker, root / "one").error
    assert "no directory" in inspect(worker, tmp_path / "absent").error
    assert "no adapter_config.json" in inspect(worker, tmp_path).error

    def fail(*args: Any, **options: Any) -> None:
        raise MemoryError("none left")

    monkeypatch.setattr(reader, "read_adapter", fail)
    inspected = inspect(worker, root / "one")
    assert inspected.is_transient and "reading it failed for now: none left" in inspected.error
    load = LoadAdapter(0, "hash", str(root / "one"), int_array([1]))
    assert "reading it failed for now: none left" in ask(worker, load).error


def test_load_from_the_store_and_from_disk(root: Path, tmp_path: Path) -> None:
    """A budget of one byte keeps only the last adapter: the first is read again."""
    worker = Worker(make_config(root, adapter_host_bytes=1))
    driver = StepDriver(worker, block_tokens=16, max_num_seqs=4)
    folder = tmp_path / "moved"
    shutil.copytree(root / "one", folder)
    one = inspect(worker, folder)
    two = inspect(worker, root / "two")
    for adapter, from_host in ((two, True), (one, False), (two, False)):
        load = LoadAdapter(1, adapter.content_hash, adapter.path, int_array([5]))
        loaded = ask(worker, load)
        want = AdapterLoaded(1, adapter.content_hash, "", loaded.load_us, from_host)
        assert loaded == want
    prompt = list(range(10, 30))
    expected = Sequence(prompt, 1)
    driver.run([expected], 4)
    base = Sequence(prompt)
    driver.run([base], 4)
    assert expected.output != base.output
    # The files have changed since: a load never takes other weights under an old name.
    shutil.copy(root / "two" / "adapter_model.safetensors", folder)
    inspect(worker, root / "two")
    loaded = ask(worker, LoadAdapter(2, one.content_hash, one.path, int_array([6])))
    assert "have changed since it was registered" in loaded.error
    shutil.rmtree(folder)
    loaded = ask(worker, LoadAdapter(2, one.content_hash, one.path, int_array([6])))
    assert "no directory" in loaded.error
    with pytest.raises(ValueError, match=r"slots \[2\], which are not loaded"):
        driver.run([Sequence(prompt, 2)], 4)  # never an answer of the base model instead


def test_unload_and_reuse(root: Path) -> None:
    worker = Worker(make_config(root))
    driver = StepDriver(worker, block_tokens=16, max_num_seqs=4)
    one, two = inspect(worker, root / "one"), inspect(worker, root / "two")
    outputs = {}
    prompt = list(range(40, 60))
    for name, adapter in (("one", one), ("two", two), ("one again", one)):
        loaded = ask(worker, LoadAdapter(3, adapter.content_hash, adapter.path, int_array([9])))
        assert not loaded.error
        sequence = Sequence(prompt, 3)
        driver.run([sequence], 5)
        outputs[name] = sequence.output
        worker.handle(UnloadAdapter(3))
        base = Sequence(prompt)
        driver.run([base], 5)
        outputs["base"] = base.output
    assert outputs["one"] == outputs["one again"]
    assert len({tuple(output) for output in outputs.values()}) == 3
    with pytest.raises(ValueError, match=r"slots \[3\], which are not loaded"):
        driver.run([Sequence(prompt, 3)], 5)


def test_a_load_into_a_wrong_number_of_pages_fails(root: Path) -> None:
    worker = Worker(make_config(root))
    one = inspect(worker, root / "one")
    wrong = ask(worker, LoadAdapter(3, one.content_hash, one.path, int_array([9, 10])))
    assert "needs 1 pages, not 2" in wrong.error
    right = ask(worker, LoadAdapter(3, one.content_hash, one.path, int_array([9])))
    assert not right.error


def test_drop_frees_host_memory(root: Path) -> None:
    worker = Worker(make_config(root))
    one = inspect(worker, root / "one")
    worker.handle(DropAdapter(one.content_hash))
    assert worker.events(120.0) == [AdapterEvicted(one.content_hash)]
    loaded = ask(worker, LoadAdapter(3, one.content_hash, one.path, int_array([9])))
    assert not loaded.error and not loaded.from_host
    worker.close()


def test_error_in_a_step_is_raised(root: Path) -> None:
    worker = Worker(make_config(root))
    plan = StepPlan(
        step_id=0,
        freed_slots=int_array(),
        new_requests=[],
        page_slots=int_array([0] * 80),
        page_ids=int_array([1] * 80),
        slots=int_array(),
        positions=int_array(),
        num_tokens=int_array(),
        samples=int_array(),
    )
    with pytest.raises(ValueError, match="more than .* pages"):
        worker.handle(plan)
    with pytest.raises(TypeError, match="does not take str"):
        worker.handle("hello")  # type: ignore[arg-type]


def test_refused_at_the_start(root: Path, tmp_path: Path) -> None:
    config = make_config(root)

    def refused(reason: str, **model: Any) -> None:
        with pytest.raises(ConfigError, match=reason):
            Worker(replace(config, model=replace(config.model, **model)))

    refused("max_model_len 4096 is more than the 2048 tokens", max_model_len=4096)
    refused("max_model_len 1009 does not fit: the pool of 64 pages holds 1008", max_model_len=1009)
    refused("does not exist", model=str(tmp_path / "absent"))
    if not torch.cuda.is_available():
        refused("finds no CUDA GPU", device="cuda")
    with pytest.raises(ConfigError, match="fewer than 2 pages"):
        Worker(make_config(root, num_pages=None, pool_bytes=5000))
    with pytest.raises(ConfigError, match="no multiple of 256: raise block_tokens"):
        shutil.copytree(root / "base", tmp_path / "tiny")
        values = json.loads((tmp_path / "tiny" / "config.json").read_text())
        values |= {"head_dim": 8, "num_key_value_heads": 1}
        (tmp_path / "tiny" / "config.json").write_text(json.dumps(values))
        Worker(replace(make_config(root, block_tokens=1), model=ModelConfig(
            model=str(tmp_path / "tiny"), device="cpu", load_format="dummy")))  # fmt: skip
    backend = replace(config.backend, lora_backend="nope")
    with pytest.raises(ConfigError, match=r"no lora backend 'nope'; there are: .*torch \(usable\)"):
        Worker(replace(config, backend=backend))


def test_model_len(root: Path) -> None:
    config = make_config(root, num_pages=500)
    assert Worker(config).ready.max_model_len == 2048
    asked = replace(config, model=replace(config.model, max_model_len=100))
    assert Worker(asked).ready.max_model_len == 100
    assert Worker(make_config(root, num_pages=None, pool_bytes=1 << 20)).ready.num_pages == 85


def test_dtype() -> None:
    from loraplex.engine.model.spec import ModelSpec

    spec = ModelSpec("LlamaForCausalLM", 64, 160, 3, 4, 2, 16, 512, 2048, 1e-5, 1e4,
                     dtype=torch.float16)  # fmt: skip
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert resolve_dtype("auto", spec, cpu) == torch.float32
    assert resolve_dtype("auto", spec, gpu) == torch.float16
    assert resolve_dtype("bfloat16", spec, cpu) == torch.bfloat16
    assert resolve_dtype("auto", replace(spec, dtype=torch.float32), gpu) == torch.bfloat16
