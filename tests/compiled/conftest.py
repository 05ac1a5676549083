"""Kernels as they are compiled for a GPU, their PTX carried out on the CPU: a process of its own (tests/test_compiled.py).

What the interpreter cannot show is here: bf16, a fused multiply-add, inline assembly, the tensor core's instructions.
"""

from __future__ import annotations

import os

if not os.environ.get("EZO_TESTS_PTX"):
    collect_ignore_glob = ["*"]

from tests.interpret.conftest import cuda_kernels, key, on_cpu  # noqa: F401
