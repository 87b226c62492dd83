"""Benchmarks of the CUDA kernels: ``python -m benchmarks``, from a checkout, on a GPU.

``measure``, ``inside_jax``, ``end_to_end``, ``sparse`` and ``cache_ops`` time, ``sections`` and
``sparse`` say what a run consists of, ``report`` and ``plots`` show results, ``targets`` judges
them. Cases are those of tests/cases.py and tests/sparse_cases.py.
"""

import sys
from pathlib import Path

# Cases and the raw launchers are the tests' own.
_TESTS = str(Path(__file__).resolve().parents[1] / "tests")
if _TESTS not in sys.path:
    sys.path.insert(0, _TESTS)
