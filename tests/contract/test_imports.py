"""Imports of a part of the package load no more than they need; each runs in a new interpreter."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "triton", "cupy", "xformers", "flashinfer", "transformers")


def loaded_by(statement: str) -> set[str]:
    """Returns the top-level modules in sys.modules after the statement."""
    code = f"{statement}\nimport sys\nprint(' '.join({{m.split('.')[0] for m in sys.modules}}))"
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import loraplex",
        "import loraplex.backends.registry",
        "import loraplex.entrypoints.cli.main",
        "from loraplex import LLM, AsyncClient, Client, LoRARequest, SamplingParams",
    ],
)
def test_light_imports_load_no_gpu_library(statement: str) -> None:
    assert not loaded_by(statement) & set(HEAVY)


@pytest.mark.parametrize("module", ["scheduler", "worker_protocol", "config"])
def test_scheduler_is_plain_python(module: str) -> None:
    modules = loaded_by(f"import loraplex.scheduler.{module}")
    assert not modules & {*HEAVY, "numpy", "zmq"}


def test_public_names_resolve() -> None:
    import loraplex

    for name in loraplex.__all__:
        assert getattr(loraplex, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        loraplex.nope  # noqa: B018
