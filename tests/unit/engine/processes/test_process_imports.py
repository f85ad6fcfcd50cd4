"""Users wait for the imports of an engine's processes, clients for a restarted frontend's."""

import subprocess
import sys

import pytest

NUMERIC = ("torch", "numpy", "gguf", "triton")
PROCESSES = "loraplex.engine.processes"


@pytest.mark.parametrize(
    "module, needless",
    [
        (f"{PROCESSES}.frontend_main", (*NUMERIC, "jinja2", "asyncio", "tqdm", "yaml")),
        (f"{PROCESSES}.scheduler_main", (*NUMERIC, "jinja2", "asyncio", "tqdm", "tokenizers")),
        ("loraplex.engine.worker.adapters.adapter_warnings", ("jinja2", "tokenizers")),
        ("loraplex.entrypoints.offline.llm", (*NUMERIC, "jinja2", "tokenizers", "tqdm", "yaml")),
    ],
)
def test_a_process_imports_only_what_every_start_needs(
    module: str, needless: tuple[str, ...]
) -> None:
    code = f"import sys, {module}; print([name for name in {needless} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
