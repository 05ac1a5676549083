"""A CPU step where nothing can be kept: a package and a home that are read-only."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import warnings
from numba.core import caching
# What an installation and a home that cannot be written come to: no place answers.
caching.CacheImpl._locator_classes.clear()
caching.CodeLibraryCacheImpl._locator_classes.clear()
import torch
import ezo_kernels as ezo
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for precision in ("float", "int8"):
        model = ezo.convert_(ezo.models.LeNet5(generator=torch.Generator().manual_seed(0)), head=0, precision=precision)
        whole = precision == "int8"
        opt = ezo.ElasticZOInt8(model, seed=1) if whole else ezo.ElasticZO(model, lr=1e-4, seed=1)
        x = torch.linspace(-1, 1, 2 * 784).reshape(2, 1, 28, 28)
        opt.train_step(ezo.quantize(x) if whole else x, torch.tensor([3, 4]))
        assert opt.step_count.item() == 1 and opt.skipped.item() == 0
        print(sum(p.detach().double().sum().item() for p in model.state_dict().values()))
print(sum("NUMBA_CACHE_DIR" in str(w.message) for w in said))
"""


def test_steps_work_where_nothing_can_be_kept():
    def run(script):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    bare = "\n".join(line for line in SCRIPT.splitlines() if "_locator_classes" not in line)
    *values, said = run(SCRIPT)
    *kept, quiet = run(bare)
    assert values == kept and (said, quiet) == ("1", "0")
