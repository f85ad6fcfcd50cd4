"""Clients wait for the imports of a frontend that is started again."""

import subprocess
import sys

HEAVY = ("torch", "numpy", "gguf", "triton")
CODE = f"""
import sys
import loraplex.engine.processes.frontend_main
print([name for name in {HEAVY} if name in sys.modules])
"""


def test_a_frontend_imports_no_heavy_library() -> None:
    result = subprocess.run(
        [sys.executable, "-P", "-c", CODE], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
