"""A worker without a model behind the real worker's interface, for engines that start fast.

Wraps helpers.fakes.fake_worker: its oracle predicts every token from the prompt and the adapter's
content. An adapter's content is the text of its adapter_config.json.
"""

import time
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraplex.engine.adapters.adapter_folders import AdapterFolders
from loraplex.engine.config import EngineConfig, ModelConfig
from loraplex.memory.config import MemoryConfig
from loraplex.scheduler.config import SchedulerConfig
from loraplex.scheduler.worker_protocol import (
    DropAdapter,
    InspectAdapter,
    LoadAdapter,
    StepPlan,
    UnloadAdapter,
    WorkerReady,
)

from helpers.fakes.fake_model import oracle, sampling_spec
from helpers.fakes.fake_worker import FakeAdapter, FakeWorker

VOCAB_SIZE = 384
MAX_MODEL_LEN = 512
NUM_PAGES = 400
BLOCK_TOKENS = 16
ADAPTER_PAGES = 3
HOST_ADAPTERS = 100


def fake_config(**parts: Any) -> EngineConfig:
    """Returns a small engine that takes token ids; `parts` replace parts of the configuration."""
    config = EngineConfig(
        model=ModelConfig(model="fake", skip_tokenizer_init=True),
        memory=MemoryConfig(num_pages=NUM_PAGES, block_tokens=BLOCK_TOKENS, max_adapter_slots=16),
        scheduler=SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=512),
    )
    config = replace(config, server=replace(config.server, endpoint=""))
    return replace(config, **parts)


def make_fake_adapter(path: Path, content: str) -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(content, encoding="utf-8")
    return path


class FakeEngineWorker:
    """Answers at once, or `delay_s` after each step."""

    def __init__(
        self,
        config: EngineConfig,
        rank: int,
        *,
        wakeup: Callable[[], None],
        progress: Callable[[str], None] = lambda text: None,
        delay_s: float = 0.0,
        crash_after: int = 0,
        sleep_after: int = 0,
        num_layers: int = 1,
        keeps_loads: bool = False,
        on_layer: Callable[[], None] = lambda: None,
        folder_server: str = "",
    ) -> None:
        """It raises after `crash_after` steps, like a worker whose GPU has failed. The step after
        `sleep_after` steps never ends. The delay of a step has `num_layers` parts. It answers no
        load if `keeps_loads`."""
        self._folders = AdapterFolders(folder_server)
        self._keeps_loads = keeps_loads
        self._sleep_after = sleep_after
        self._num_layers = num_layers
        self._on_layer = on_layer
        self._delay_s = delay_s
        self._crash_after = crash_after
        self._num_steps = 0
        self._events: deque[Any] = deque()
        self._fake = FakeWorker(
            num_pages=config.memory.num_pages or NUM_PAGES,
            block_tokens=config.memory.block_tokens,
            max_num_seqs=config.scheduler.max_num_seqs,
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
            max_adapter_slots=config.memory.max_adapter_slots,
            vocab_size=VOCAB_SIZE,
            max_host=HOST_ADAPTERS,
        )
        self.ready = WorkerReady(
            rank=rank,
            num_pages=config.memory.num_pages or NUM_PAGES,
            page_bytes=4096,
            num_layers=1,
            max_model_len=config.model.max_model_len or MAX_MODEL_LEN,
            vocab_size=VOCAB_SIZE,
            device="fake",
            lora_backend="fake",
            attention_backend="fake",
            eos_token_ids=array("i"),
        )

    def handle(self, command: Any) -> None:
        match command:
            case StepPlan():
                self._step(command)
            case InspectAdapter():
                with self._folders.open(command.path) as folder:
                    self._fake.files[command.path] = _read(folder)
                self._events.append(self._fake.inspect(command))
            case LoadAdapter() if not self._keeps_loads:
                self._events.append(self._fake.load(command))
            case UnloadAdapter():
                self._fake.unload(command)
            case DropAdapter():
                self._fake.drop(command)
        self._events.extend(self._fake.take_evicted())

    def _step(self, plan: StepPlan) -> None:
        self._num_steps += 1
        if self._crash_after and self._num_steps > self._crash_after:
            raise RuntimeError("the fake device is broken")
        while self._sleep_after and self._num_steps > self._sleep_after:
            time.sleep(1)
        for _ in range(self._num_layers):
            self._on_layer()
            time.sleep(self._delay_s / self._num_layers)
        self._events.append(self._fake.step(plan))

    def events(self, timeout_s: float = 0.0) -> list[Any]:
        events = list(self._events)
        self._events.clear()
        return events

    def close(self) -> None:
        self._events.clear()


def _read(path: Path) -> FakeAdapter:
    try:
        content = (path / "adapter_config.json").read_text(encoding="utf-8")
    except OSError as error:
        return FakeAdapter(error=str(error))
    return FakeAdapter(content=content, num_pages=ADAPTER_PAGES)


def expected_tokens(prompt: list[int], content: str = "", *, max_tokens: int) -> list[int]:
    """Returns the fake engine's answer to a prompt under an adapter of this content."""
    spec = sampling_spec(max_tokens=max_tokens)
    return oracle(prompt, content, spec, MAX_MODEL_LEN, VOCAB_SIZE)[0]
