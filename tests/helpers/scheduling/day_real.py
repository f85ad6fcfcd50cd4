"""A day of adapters through the whole engine in one thread: PEFT files, a small model on the CPU.

The oracle is the Hugging Face model with an adapter merged into its weights.
"""

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save

from loraplex.engine.config import AdapterConfig, EngineConfig, ModelConfig
from loraplex.engine.errors import AdapterError, ClientError, LoraplexError, UnknownAdapterError
from loraplex.engine.frontend.sampling_params import SamplingParams
from loraplex.engine.processes.in_process import InProcessEngine
from loraplex.entrypoints.client.outputs import RequestFailure
from loraplex.entrypoints.client.sync_client import Client
from loraplex.memory.config import MemoryConfig
from loraplex.scheduler.config import SchedulerConfig

from helpers.models.hf_models import make_hf_model

NUM_NAMES = 2000
NUM_CONTENTS = 500
HOST_BYTES = 300_000  # some eighty adapters
MAX_OUTSTANDING = 24
MAX_TOKENS = 8
MAX_WAIT_ACTIONS = 4000
NUM_SAMPLES = 40  # of the memory that the process holds
PROMPTS = ([5, 9, 200, 31], [77, 8, 8, 301], [400, 3, 17, 90])
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MODULES = {"q_proj": (64, 64), "v_proj": (64, 32)}
NUM_LAYERS = 2
FAULTS = ("truncated", "shapes", "no weights", "pickle", "not json")


class Contents:
    """Holds what adapters may contain: by index, the files' bytes and the expected tokens."""

    def __init__(self, root: Path) -> None:
        self._model = make_hf_model("llama", root / "base", seed=3, num_hidden_layers=NUM_LAYERS)
        self._weights = {name: p.detach().clone() for name, p in self._model.named_parameters()}
        self._answers: dict[int, list[list[int]]] = {}

    def tensors(self, index: int) -> tuple[dict[str, torch.Tensor], int, int]:
        """Tensors by name, rank and alpha."""
        rank, alpha = 1 + index % 3, 4 + index % 5
        generator = torch.Generator().manual_seed(index)
        tensors = {}
        for layer in range(NUM_LAYERS):
            for name, (inputs, outputs) in MODULES.items():
                prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
                a = torch.randn(rank, inputs, generator=generator)
                b = torch.randn(outputs, rank, generator=generator) * 0.2 / alpha * rank**0.5
                tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"] = a, b
        return tensors, rank, alpha

    def write(self, folder: Path, index: int) -> None:
        tensors, rank, alpha = self.tensors(index)
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none",
                  "target_modules": sorted(MODULES)}  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        (folder / WEIGHTS).write_bytes(save(tensors))
        (folder / CONFIG).write_text(json.dumps(config))

    def write_fault(self, folder: Path, fault: str) -> None:
        """A good adapter with something wrong."""
        self.write(folder, 0)
        weights = folder / WEIGHTS
        if fault == "truncated":
            weights.write_bytes(weights.read_bytes()[:-7])
        elif fault == "shapes":
            tensors = {name: t.repeat(2, 2) for name, t in self.tensors(0)[0].items()}
            weights.write_bytes(save(tensors))
        elif fault == "no weights":
            weights.unlink()
        elif fault == "pickle":
            weights.rename(folder / "adapter_model.bin")
        else:
            (folder / CONFIG).write_text("{")

    @torch.no_grad()
    def answer(self, index: int, prompt: int) -> list[int]:
        """MAX_TOKENS greedy tokens after PROMPTS[prompt]; of the base model for index -1."""
        if index not in self._answers:
            self._merge(index)
            ids = torch.tensor(PROMPTS)
            for _ in range(MAX_TOKENS):
                chosen = self._model(ids).logits[:, -1].argmax(-1)
                ids = torch.cat([ids, chosen[:, None]], dim=1)
            self._answers[index] = ids[:, len(PROMPTS[0]) :].tolist()
        return self._answers[index][prompt]

    def _merge(self, index: int) -> None:
        tensors, rank, alpha = self.tensors(index) if index >= 0 else ({}, 1, 1)
        for name, parameter in self._model.named_parameters():
            parameter.copy_(self._weights[name])
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{prefix}.lora_A.weight" in tensors:
                a, b = tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"]
                parameter += alpha / rank * (b @ a)


class RealDay:
    """Random traffic: `run` draws a number of actions; `end` finishes and empties everything."""

    def __init__(self, root: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.root = root
        self.contents = Contents(root)
        self.names = [f"adapter-{index:04d}" for index in range(NUM_NAMES)]
        self.meaning: dict[str, int] = {}  # name -> content that new requests get
        self.paths: dict[str, Path] = {}
        for name in self.names:
            self.meaning[name] = self.rng.randrange(NUM_CONTENTS)
            self.paths[name] = root / "adapters" / name
            self.contents.write(self.paths[name], self.meaning[name])
        self.engine = InProcessEngine(self._config())
        self.client = Client(self.engine)
        self.outstanding: dict[str, dict[str, Any]] = {}
        self.counts: Counter[str] = Counter()
        self.num_paths = 0
        self.rss: list[int] = []
        self.longest_wait = 0  # actions from a request to its end

    def _config(self) -> EngineConfig:
        return EngineConfig(
            model=ModelConfig(
                model=str(self.root / "base"), device="cpu", skip_tokenizer_init=True
            ),
            memory=MemoryConfig(
                num_pages=80, block_tokens=4, max_adapter_slots=24, max_lora_rank=8,
                adapter_host_bytes=HOST_BYTES,
            ),
            scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=32),
            adapter=AdapterConfig(
                adapter_dir=str(self.root / "adapters"), adapter_root=str(self.root)
            ),
        )  # fmt: skip

    def run(self, num_actions: int) -> None:
        actions = {
            self.ask: 30, self.poll: 30, self.cancel: 1, self.replace: 2, self.replace_in_place: 1,
            self.replace_by_a_bad_one: 1, self.unload: 1.5, self.pin: 0.7, self.unpin: 0.5,
            self.look: 0.2,
        }  # fmt: skip
        sample_every = max(1, num_actions // NUM_SAMPLES)
        while self.counts["actions"] < num_actions:
            for action in self.rng.choices(list(actions), list(actions.values()), k=20):
                action()
                self.engine.scheduler.check_integrity()
                self.counts["actions"] += 1
            now = self.counts["actions"]
            oldest = min((asked["at"] for asked in self.outstanding.values()), default=now)
            assert now - oldest < MAX_WAIT_ACTIONS, "a request starves"
            if now // sample_every > len(self.rss):
                self.rss.append(psutil.Process().memory_info().rss)

    def end(self) -> None:
        """Serve what is left, unload every name; nothing may be left anywhere."""
        while self.outstanding:
            self.poll(30.0)
        stats = self.client.stats()
        assert stats["running"] == stats["waiting"] == stats["pages_kv"] == 0
        service = stats["adapter_usage"]
        assert service["num_requests"] == service["num_ended"]
        for info in self.client.list_adapters():
            self.client.unload_adapter(info["name"])
        while self.engine.step():
            pass
        stats = self.client.stats()
        assert stats["pages_adapter"] == stats["host_adapters"] == 0
        self.client.close()

    # Actions

    def ask(self) -> None:
        if len(self.outstanding) >= MAX_OUTSTANDING:
            return
        rng = self.rng
        name = self._popular() if rng.random() < 0.92 else ""
        asked = {
            "name": name, "prompt": rng.randrange(len(PROMPTS)), "num": rng.randint(1, MAX_TOKENS),
            "content": self.meaning.get(name, -1), "is_known": not name or name in self.meaning,
            "at": self.counts["actions"], "cancelled": False,
        }  # fmt: skip
        params = SamplingParams(max_tokens=asked["num"], temperature=0.0, ignore_eos=True)
        request_id = self.client.submit(
            PROMPTS[asked["prompt"]], params, adapter=name or None, salt=rng.choice(["", "tenant"])
        )
        self.outstanding[request_id] = asked

    def poll(self, timeout_s: float = 0.0) -> None:
        for result in self.client.poll(timeout_s):
            asked = self.outstanding.pop(result.request_id)  # a second end is a KeyError
            self.longest_wait = max(self.longest_wait, self.counts["actions"] - asked["at"])
            if isinstance(result, RequestFailure):
                self._check_failure(asked, result.error)
                continue
            (completion,) = result.outputs
            want = self.contents.answer(asked["content"], asked["prompt"])[: asked["num"]]
            if completion.finish_reason == "abort":
                assert asked["cancelled"]
                want = want[: len(completion.token_ids)]
            self.counts[str(completion.finish_reason)] += 1
            assert asked["is_known"] or not completion.token_ids, f"by no adapter: {asked}"
            assert completion.token_ids == want, asked

    def _check_failure(self, asked: dict[str, Any], error: LoraplexError) -> None:
        if isinstance(error, UnknownAdapterError):
            assert not asked["is_known"]
            self.counts["unknown"] += 1
        else:  # its files were written over while it was on disk alone
            assert isinstance(error, AdapterError) and "changed" in str(error), error
            self.counts["files changed"] += 1

    def cancel(self) -> None:
        if self.outstanding:
            request_id = self.rng.choice(list(self.outstanding))
            self.outstanding[request_id]["cancelled"] = True
            self.client.cancel(request_id)

    def replace(self) -> None:
        name, index = self._popular(), self.rng.randrange(NUM_CONTENTS)
        path = self._new_path()
        self.contents.write(path, index)
        self._load(name, path, index)

    def replace_in_place(self) -> None:
        """Other files at the same path, as a training run that saves again."""
        name, index = self._popular(), self.rng.randrange(NUM_CONTENTS)
        if name in self.paths and self.client.list_adapters(name)[0]["state"] == "ready":
            self.contents.write(self.paths[name], index)
            self._load(name, self.paths[name], index)

    def replace_by_a_bad_one(self) -> None:
        name, fault = self._popular(), self.rng.choice((*FAULTS, "missing"))
        path = self._new_path()
        if fault != "missing":
            self.contents.write_fault(path, fault)
        with pytest.raises(AdapterError):
            self.client.load_adapter(name, str(path))
        self.counts["bad loads"] += 1
        if name not in self.meaning and fault != "missing":
            with pytest.raises(AdapterError):
                next(self.client.generate([1], adapter=name))
            self.client.unload_adapter(name)
        shutil.rmtree(path, ignore_errors=True)

    def unload(self) -> None:
        name = self._popular()
        if name not in self.meaning:
            index = self.rng.randrange(NUM_CONTENTS)
            path = self._new_path()
            self.contents.write(path, index)
            self._load(name, path, index, lazy=True)
            return
        self.client.unload_adapter(name)
        del self.meaning[name], self.paths[name]
        self.counts["unloaded"] += 1

    def pin(self) -> None:
        try:
            assert self.client.pin_adapter(self._popular())["pinned"]
            self.counts["pinned"] += 1
        except ClientError as error:
            self.counts[f"pin refused: {error.code}"] += 1

    def unpin(self) -> None:
        pinned = [info["name"] for info in self.client.list_adapters() if info["pinned"]]
        if pinned:
            assert not self.client.unpin_adapter(self.rng.choice(pinned))["pinned"]

    def look(self) -> None:
        stats = self.client.stats()
        assert stats["pages_pinned"] <= stats["num_pages"] // 2
        assert {info["name"] for info in self.client.list_adapters()} == set(self.meaning)

    # Parts of actions

    def _popular(self) -> str:
        return self.names[int(NUM_NAMES * self.rng.random() ** 5)]

    def _new_path(self) -> Path:
        self.num_paths += 1
        return self.root / "later" / str(self.num_paths)

    def _load(self, name: str, path: Path, index: int, *, lazy: bool = False) -> None:
        """Requests sent so far keep what they had."""
        self.client.load_adapter(name, str(path), lazy=lazy)
        self.meaning[name], self.paths[name] = index, path
        self.counts["loaded"] += 1
