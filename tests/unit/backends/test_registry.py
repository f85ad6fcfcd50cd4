"""The registry: names, reasons, and the choice of `auto`."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from loraplex.backends import registry
from loraplex.backends.attention.contract import AttentionSpec
from loraplex.backends.collective.contract import CollectiveSpec
from loraplex.backends.fused.contract import FusedSpec
from loraplex.backends.fused.torch_ops import TorchFused
from loraplex.backends.linear.contract import PLAIN, LinearSpec
from loraplex.backends.lora.contract import LoRASpec
from loraplex.backends.registry import Backend, BackendError, list_backends, resolve

CPU = torch.device("cpu")
LORA = LoRASpec(
    max_num_tokens=16, max_rank=8, dtype=torch.float32, device=CPU, page_elems=512, groups=()
)
ATTENTION = AttentionSpec(
    num_heads=2, num_kv_heads=1, head_dim=16, block_tokens=16, scale=0.25,
    dtype=torch.float32, device=CPU, max_num_seqs=4, max_num_tokens=16, max_pages=4,
)  # fmt: skip
FUSED = FusedSpec(dtype=torch.float32, device=CPU, head_dim=16)
LINEAR = LinearSpec(dtype=torch.float32, device=CPU, form=PLAIN)
SPECS = {"lora": LORA, "attention": ATTENTION, "fused": FUSED, "linear": LINEAR}


class Works:
    def __init__(self, spec: Any) -> None:
        self.spec = spec

    @staticmethod
    def probe(spec: Any = None) -> str | None:
        return None


class Refuses(Works):
    @staticmethod
    def probe(spec: Any = None) -> str | None:
        return None if spec is None else "it dislikes this model"


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = (
        Backend("op", "absent", "loraplex.backends.no_such_file", "Nothing"),
        Backend("op", "picky", __name__, "Refuses"),
        Backend("op", "plain", __name__, "Works"),
        Backend("op", "last", __name__, "Works"),
        Backend("unusable", "absent", "loraplex.backends.no_such_file", "Nothing"),
    )
    monkeypatch.setattr(registry, "_BACKENDS", entries)
    monkeypatch.setattr(registry, "OPS", ("op", "unusable"))
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or _this_module())


def _this_module() -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(Works=Works, Refuses=Refuses)


def test_auto_takes_the_first_that_can(fakes: None) -> None:
    assert resolve("op").name == "picky"
    assert resolve("op", "auto", LORA).name == "plain"
    assert resolve("op", "last", LORA).name == "last"
    assert resolve("op", "last").make(LORA).spec is LORA


def test_errors_list_what_there_is_and_why_not(fakes: None) -> None:
    with pytest.raises(BackendError, match=r"no op backend 'nope'; there are: auto .*absent \(its"):
        resolve("op", "nope")
    with pytest.raises(BackendError, match=r"'picky' cannot run here: it dislikes this model; .*"
                       r"plain \(usable\)"):  # fmt: skip
        resolve("op", "picky", LORA)
    with pytest.raises(BackendError, match="'absent' cannot run here: its library does not load"):
        resolve("op", "absent")
    with pytest.raises(BackendError, match="no unusable backend can run here: .*absent"):
        resolve("unusable")
    with pytest.raises(BackendError, match="no op 'sorting'; there are op, unusable"):
        resolve("sorting")


COLLECTIVE = CollectiveSpec(
    worker_rank=0,
    world_size=2,
    group=None,
    device=torch.device("cpu"),
    dtype=torch.float32,
    hidden_size=64,
    max_num_tokens=8,
    max_num_samples=8,
    gather_width=32,
    fused=TorchFused(SPECS["fused"]),
)
ALL_SPECS = {**SPECS, "collective": COLLECTIVE}


@pytest.mark.parametrize("backend", list_backends(), ids=lambda b: f"{b.op}-{b.name}")
def test_every_backend_can_be_asked(backend: Backend) -> None:
    reason = backend.probe()
    assert reason is None or (isinstance(reason, str) and reason)
    reason = backend.probe(ALL_SPECS[backend.op])
    assert reason is None or (isinstance(reason, str) and reason)


@pytest.mark.parametrize(("op", "spec"), SPECS.items())
def test_torch_runs_anywhere_and_names_match(op: str, spec: Any) -> None:
    backend = resolve(op, "torch", spec)
    assert backend.make(spec).name == "torch"
    assert len({b.name for b in list_backends(op)}) == len(list_backends(op))


def test_import_is_light() -> None:
    code = "import sys, loraplex.backends.registry as r; assert 'torch' not in sys.modules; " \
        "r.list_backends()"  # fmt: skip
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=120)
