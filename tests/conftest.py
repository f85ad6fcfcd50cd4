"""Before any test imports torch."""

import os

# Tests compute little at a time. OpenMP threads that spin until the others are done take the cores
# from those they wait for, and on a busy machine that costs minutes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
