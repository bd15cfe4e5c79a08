"""The interpreter that the tests have made faster computes the bits that Triton's own computes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = """
import hashlib, sys, torch
from lwadamw import AdamW
from lwadamw.state.combinations import COMBINATIONS
from tests.company.storages import dtypes_of, options_of
from tests.interpreter import quicken

if sys.argv[1] == "quick":
    quicken()
seen = hashlib.sha256()
for name in COMBINATIONS:
    for options in ({}, {"decay": "huber"}, {"amsgrad": "8-bit" not in name}):
        torch.manual_seed(0)
        dtype = dtypes_of(name, "triton")[0]
        params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((33, 17), (3,), (5, 300))]
        named = [(str(i), p) for i, p in enumerate(params)]
        optimizer = AdamW([{"params": named, **options_of(name), **options}], backend="triton", max_grad_norm=1.0)
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        norms = optimizer.norms()
        seen.update(repr([list(x) for x in (norms.weight, norms.update, norms.grad)]).encode())
        for t in (t for p in params for t in (p, *optimizer.state[p].values())):
            seen.update(t.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
print(seen.hexdigest())
"""


@pytest.mark.matrix
def test_the_quick_interpreter_computes_the_same_bits():
    def bits(kind):
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", STEPS, kind]
        return subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True).stdout

    assert bits("quick") == bits("slow") != ""
