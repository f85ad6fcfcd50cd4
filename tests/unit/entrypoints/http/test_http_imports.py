"""The HTTP server's process loads no GPU library."""

import subprocess
import sys


def test_the_process_imports_no_torch() -> None:
    code = "import sys, loraplex.entrypoints.http.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0
